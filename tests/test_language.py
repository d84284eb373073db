"""Phrases without ordinary meaning stay out of the documentation, docstrings and messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from os.path import relpath
from pathlib import Path

import pytest

import pinning_middleware

from .contrib.pages import DOCS, PAGES

ROOT = DOCS.parent
PACKAGE = Path(pinning_middleware.__file__).parent
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *sorted(PACKAGE.rglob("*.py"))]
# Pattern → what to write.
PHRASES = {
    r"by turns": "round robin",
    r"serves? nobody": "is out of rotation",
    r"serves again": "is back in rotation",
    r"stands? in\b|stand-in": "substitutes, fails over to",
    r"says? nothing|say nothing": "is unresponsive; is no evidence",
    r"says? of\b": "states about; shows",
    r"farewell": "without closing the connection",
    r"dies\b": "fails",
    r"its word\b": "its report",
    r"tells? a position|tells? how far": "reports a position",
    r"(?:can|could)(?:no|')t be told": "is unavailable, is unknown",
    r"left behind|handed on|hands on": "outgoing, propagated",
    r"(?:carried|tested|pinned|set|kept|done) by hand": "manual",
    r"whoever|nobody|somebody|anybody": "name the server, the caller, the user",
    r"strangers?\b": "another user, an anonymous user",
    r"older interface": "legacy interface",
    r"the kit\b|test kit": "test utilities",
    r"watchers?\b|probers?\b": "monitor",
    r"reruns?\b|run again elsewhere": "retry, retried on another server",
    r"asks? (?:the|a|each|that) (?:server|primary|replica|node)s?\b": "probes",
    r"asked (?:again|for what)": "probed again; queried",
}


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line of a page, and each text of a module, with its line."""
    if path.suffix == ".md":
        yield from enumerate(path.read_text().splitlines(), 1)
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: relpath(path, ROOT))
def test_text_is_plain_technical_english(path: Path) -> None:
    found = [
        f"{path.name}:{line}: {match[0]!r}: {better}"
        for line, text in sentences(path)
        for pattern, better in PHRASES.items()
        if (match := re.search(rf"\b(?:{pattern})", text, re.IGNORECASE))
    ]
    assert found == []
