"""The pages in ``docs`` are correct: their Python, names and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pinning_middleware.conf import DEFAULTS

from .contrib.pages import DOCS, PAGES, blocks, name_of

ROOT = DOCS.parent
README = ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile(page: Path) -> None:
    assert len(list(blocks(page))) == page.read_text().count("```python")


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_mentioned_settings_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![A-Z_])PINNING_[A-Z0-9_]*[A-Z0-9]", page.read_text()))
    assert named <= set(DEFAULTS)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and MyST generate from headings."""
    text = re.sub(r"^(`{3,}|:{3,}).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    named = set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    return named | {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
    }


def links(page: Path) -> list[str]:
    """Return the targets of a page's links to files and anchors of this repository."""
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
        # Sphinx copies nothing from outside of the documentation.
        assert target.is_relative_to(DOCS), link


TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_every_page_is_in_the_navigation() -> None:
    reached, new = set[Path](), {DOCS / "index.md"}
    while new:
        page = new.pop()
        reached.add(page)
        for listed in TOCTREE.findall(page.read_text()):
            for entry in listed.split():
                if not entry.startswith(":"):
                    found = set(page.parent.glob(f"{entry}.md"))
                    assert found, f"{name_of(page)} lists {entry}, which is missing"
                    new |= found - reached
    assert reached == set(PAGES)


LINKS_OF_README = re.findall(r"\]\(([^)\s]+)\)", README.read_text())
SITE = "https://pinning-middleware.readthedocs.io/en/latest/"
REPOSITORY = "https://github.com/pinning-middleware/pinning-middleware/blob/main/"
RAW = "https://raw.githubusercontent.com/pinning-middleware/pinning-middleware/main/"


@pytest.mark.parametrize("link", LINKS_OF_README)
def test_links_of_the_readme_are_absolute_and_resolve(link: str) -> None:
    """PyPI shows the README without the repository."""
    address, _, anchor = link.partition("#")
    if address.startswith(SITE):
        page = DOCS / address.removeprefix(SITE).replace(".html", ".md")
        page = page / "index.md" if page.is_dir() else page
        assert page.exists()
        assert not anchor or anchor in anchors(page)
    elif address.startswith((REPOSITORY, RAW)):
        assert (ROOT / address.removeprefix(REPOSITORY).removeprefix(RAW)).exists()
    else:
        assert address.startswith("https://")
