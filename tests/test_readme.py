"""The README is correct: its Python runs, and its settings match the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from django.core.checks import run_checks
from django.http import HttpResponse
from django.shortcuts import get_object_or_404
from django.test import override_settings
from django.utils.module_loading import import_string

import pinning_middleware
from pinning_middleware.conf import DEFAULTS
from tests.app.models import Book
from tests.app.routers import UsersRouter

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#### ((?:`PINNING_\w+`(?:, )?)+): .*?`([^`]+)`$", re.MULTILINE)


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that the README's blocks import from `shop`."""
    module = ModuleType("shop.routers")
    module.UsersRouter = UsersRouter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop.routers", module)


def settings_of(namespace: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in namespace.items() if name.isupper()}


@pytest.mark.django_db(transaction=True, databases="__all__")
@pytest.mark.filterwarnings("ignore:Overriding setting DATABASES")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_readme_block_runs(block: str, shop: None) -> None:
    namespace: dict[str, Any] = {
        "__name__": "tests.app.readme",
        "HttpResponse": HttpResponse,
        "Order": Book,
        "get_object_or_404": get_object_or_404,
    }
    exec(compile(block, "README.md", "exec"), namespace)
    settings = settings_of(namespace)
    for path in settings.get("MIDDLEWARE", []) + settings.get("DATABASE_ROUTERS", []):
        assert import_string(path)


def test_install_settings_are_sufficient() -> None:
    namespace: dict[str, Any] = {}
    exec(next(block for block in BLOCKS if block.startswith("INSTALLED_APPS")), namespace)
    settings = settings_of(namespace)
    del settings["INSTALLED_APPS"]
    with override_settings(**settings):
        assert run_checks(tags=["pinning"]) == []


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {
        name.strip("` "): eval(default)
        for names, default in HEADING.findall(README)
        for name in names.split(", ")
    }
    assert documented == DEFAULTS


def test_every_public_name_is_documented() -> None:
    for name in pinning_middleware.__all__:
        assert name in README, name


def test_files_in_the_readme_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parent.parent / path).exists(), path
