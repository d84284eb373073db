"""The README fits on a page, and what it tells a newcomer to paste and to run works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.test import override_settings
from django.utils.module_loading import import_string

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
(BLOCK,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
MAX_WORDS = 500


@pytest.fixture
def pasted() -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(BLOCK, "README.md", "exec"), namespace)
    return {name: value for name, value in namespace.items() if name.isupper()}


def test_readme_is_one_page() -> None:
    assert len(README.split()) <= MAX_WORDS


def test_settings_to_paste_pass_the_system_checks(pasted: dict[str, Any]) -> None:
    for path in pasted["MIDDLEWARE"] + pasted["DATABASE_ROUTERS"]:
        assert import_string(path)
    assert set(pasted["PINNING_REPLICAS"]) < set(pasted["DATABASES"])
    names = ("MIDDLEWARE", "DATABASE_ROUTERS", "PINNING_REPLICAS")
    with override_settings(**{name: pasted[name] for name in names}):
        assert run_checks(tags=["pinning"]) == []


def test_commands_of_the_repository_exist() -> None:
    commands = re.findall(r"^\$ make (\S+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)


def test_version_of_python_is_that_of_the_package_metadata() -> None:
    (needed,) = re.findall(r"need Python ([\d.]+)", README)
    assert f'requires-python = ">={needed}"' in (ROOT / "pyproject.toml").read_text()
