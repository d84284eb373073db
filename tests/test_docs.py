"""The pages in ``docs`` are correct: their Python, names and links."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.test import override_settings
from django.utils.module_loading import import_string

import pinning_middleware
from pinning_middleware.checks.migration import SETTINGS
from pinning_middleware.conf import DEFAULTS
from pinning_middleware.contrib import multidb
from pinning_middleware.contrib.multidb import pinning

from .contrib.pages import DOCS, PAGES, blocks, name_of

ROOT = DOCS.parent
README = ROOT / "README.md"
COMING_FROM = (DOCS / "how-to" / "coming-from.md").read_text()
OLDER = "multidb."
NAME = re.compile(r"([A-Za-z_][\w.]*)(\(.*\))?")


def rows(heading: str = "") -> Iterator[tuple[list[str], list[str]]]:
    """Return the code in the first two columns of the tables below a heading."""
    text = COMING_FROM.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    for line in (text if heading else COMING_FROM).splitlines():
        cells = line.split(" | ")
        if line.startswith("| ") and len(cells) > 1:
            yield re.findall(r"`([^`]+)`", cells[0]), re.findall(r"`([^`]+)`", cells[1])


RIGHT = sorted({name for _, write in rows() for name in write})
OF_MULTIDB = [name for was, _ in rows("django-multidb-router") for name in was]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile(page: Path) -> None:
    assert len(list(blocks(page))) == page.read_text().count("```python")


def test_settings_blocks_pass_system_checks(settings: Any) -> None:
    """Each block is used as the only settings of a site."""
    del settings.PINNING_REPLICAS
    told = 0
    for block in blocks(DOCS / "how-to" / "coming-from.md"):
        namespace: dict[str, Any] = {}
        exec(block.code, namespace)
        chosen = {name: value for name, value in namespace.items() if name.isupper()}
        chosen.pop("INSTALLED_APPS", None)
        told += len(chosen)
        with override_settings(**chosen):
            assert run_checks(tags=["pinning"]) == [], block
    assert told


@pytest.mark.parametrize("name", RIGHT)
def test_documented_replacements_exist(name: str) -> None:
    if name.startswith("PINNING_"):
        assert name in DEFAULTS
    elif name.startswith("pinning_middleware."):
        assert import_string(name)
    else:
        found = NAME.fullmatch(name)
        assert found, f"{name} is neither a setting nor a name"
        assert not keyword.iskeyword(found[1])
        assert found[1] in pinning_middleware.__all__


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_mentioned_settings_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![A-Z_])PINNING_[A-Z0-9_]*[A-Z0-9]", page.read_text()))
    assert named <= set(DEFAULTS)


@pytest.mark.parametrize("name", OF_MULTIDB)
def test_names_of_multidb_are_supported(name: str) -> None:
    if name.isupper():
        assert name in SETTINGS
    else:
        assert name.startswith(OLDER)
        assert import_string(f"pinning_middleware.contrib.{name}")


def test_supported_multidb_names_are_documented() -> None:
    kept = {f"multidb.{name}" for name in multidb.__all__ if name != "DEFAULT_DB_ALIAS"}
    kept |= {f"multidb.pinning.{name}" for name in pinning.__all__}
    assert kept <= set(OF_MULTIDB)


@pytest.mark.parametrize("name", SETTINGS)
def test_migration_page_agrees_with_the_check(name: str) -> None:
    told = [write for was, write in rows() if name in was]
    assert told, "it is not on the page"
    ours = re.findall(r"PINNING_\w+", SETTINGS[name])
    for write in told:
        assert [one for one in write if one.startswith("PINNING_")] == ours or not SETTINGS[name]


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
