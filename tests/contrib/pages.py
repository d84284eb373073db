"""The Python of the pages in ``docs``, as modules."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
_FENCE = re.compile(r"^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FILE = re.compile(r"# (\S+)\.py\n")


class Block(NamedTuple):
    """A code block: the heading above it, the file named in its first line, and its code."""

    heading: str
    file: str
    code: Any

    def run(self) -> ModuleType:
        """Run the code and return it as a module."""
        module = ModuleType(self.file.replace("/", "."))
        sys.modules[module.__name__] = module
        exec(self.code, module.__dict__)
        return module


def blocks(page: Path) -> Iterator[Block]:
    """Compile the code blocks of a page."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        before, own = text[: found.start(2)], textwrap.dedent(found[2])
        heading = _HEADING.findall(_FENCE.sub("", before))[-1]
        named = _FILE.match(own)
        # Tracebacks show the lines of the page; do not inherit the future imports of this module.
        source = "\n" * before.count("\n") + own
        code = compile(source, str(page), "exec", dont_inherit=True)
        yield Block(heading, named[1] if named else "", code)


def name_of(page: Path) -> str:
    """Return the path of a page below ``docs``, for the ids of tests."""
    return str(page.relative_to(DOCS))


def load(page: str, heading: str) -> dict[str, ModuleType]:
    """Run the blocks below a heading; return them by their files, without the ``.py``."""
    found = [block for block in blocks(DOCS / page) if block.heading == heading]
    assert found, f"{page} has no code below {heading!r}"
    return {block.file: block.run() for block in found}
