"""``docs/how-to/coming-from.md``, and the settings on the pages of a gradual rollout."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
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

from .pages import DOCS, blocks

HOW_TO = DOCS / "how-to"
COMING_FROM = (HOW_TO / "coming-from.md").read_text()
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


@pytest.mark.parametrize("page", ["coming-from.md", "switch-off.md"])
def test_settings_blocks_pass_system_checks(settings: Any, page: str) -> None:
    """Each block is used as the only settings of a site."""
    del settings.PINNING_REPLICAS
    told = 0
    for block in blocks(HOW_TO / page):
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
