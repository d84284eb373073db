"""``docs/troubleshooting.md`` has every reason of a read and of a server, and every finding."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from pinning_middleware import stats
from pinning_middleware.backend import failover, former_primary
from pinning_middleware.management import poll
from pinning_middleware.management.commands import pinning_status
from pinning_middleware.reasons import Fault, Reason

from .contrib.pages import DOCS

PAGE = (DOCS / "troubleshooting.md").read_text()


def section(heading: str) -> str:
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE
    )
    assert found, heading
    return found[1]


def rows(text: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def test_every_reason_of_a_read_has_a_heading() -> None:
    headings = re.findall(
        r"^### `(\w+)`$", section("Why did this read go to the primary?"), re.MULTILINE
    )
    assert sorted(headings) == sorted(Reason)


def test_every_reason_of_a_server_out_of_rotation_has_a_row() -> None:
    documented = rows(section("Why is a replica out of rotation?"))
    assert sorted(documented) == sorted([*Fault, stats.DRAINED])


def findings() -> Iterator[str]:
    """Yield the texts of problems that the command reports, up to their first variable part."""
    sources: tuple[Any, ...] = (
        poll.ServerPoll._state,
        poll._misconfiguration,
        stats._misdirection,
        pinning_status._details,
        pinning_status.Command._print,
    )
    yield stats.ONLY_ONE_LEFT
    for source in sources:
        tree = ast.parse(textwrap.dedent(inspect.getsource(source)))
        parts = {
            part
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(tree):
            match node:
                case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
                    yield text
                case ast.Constant(value=str(text)) if node not in parts and " " in text.strip():
                    yield text


NOT_FINDINGS = re.compile(r"Return |Pool |%Y|\\033|\n")


@pytest.mark.parametrize("finding", sorted({f for f in findings() if not NOT_FINDINGS.match(f)}))
def test_every_finding_of_pinning_status_is_explained(finding: str) -> None:
    known = section("What does pinning_status report?")
    beginning = re.split(r": |[(']", finding)[0].strip()
    assert beginning in known or f"reads {beginning}" in known


@pytest.mark.parametrize("module", [failover, former_primary])
def test_every_error_of_a_rejected_read_has_a_row(module: Any) -> None:
    documented = section("A read is slow, or raises an error")
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "rejection_error"
    ]
    assert calls
    for call in calls:
        assert f"Cannot use …, and {ast.literal_eval(call.args[2])}" in documented
