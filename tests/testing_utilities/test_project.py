"""
The small site of docs/how-to/testing.md, whose blocks are its tests: on SQLite and PostgreSQL,
serial and parallel, with Django's runner and with pytest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pinning_middleware import testing

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "testing.md"
PROJECT = Path(__file__).parent / "project"
# In a file, writes of two threads lock it, and a mirror is a second connection to it.
FILES = "test_files"


def blocks() -> dict[str, str]:
    """Return the code blocks of the page that are files, by name."""
    found = re.findall(r"```python\n# (comments/\S+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return dict(found)


def sqlite(folder: Path, mirrors: bool) -> dict[str, Any]:
    names = ("default", "replica1", "replica2")
    databases: dict[str, Any] = {
        name: {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": str(folder / f"{name}.sqlite3"),
            "TEST": {"NAME": str(folder / f"test_{name}.sqlite3")},
        }
        for name in names
    }
    if mirrors:
        for name in names[1:]:
            databases[name]["TEST"] = {"MIRROR": "default"}
    return databases


class Project:
    def __init__(self, folder: Path, databases: dict[str, Any]) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PROJECT_DATABASES": json.dumps(databases),
            "DJANGO_SETTINGS_MODULE": "project_settings",
            "PYTHONWARNINGS": "error,ignore::ResourceWarning,ignore::DeprecationWarning",
        }

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        return done.stdout + done.stderr


def project(folder: Path, databases: dict[str, Any], keep: str = "", leave: str = "") -> Project:
    """Create the site with code blocks of the page as its tests: one, or all but one."""
    shutil.copytree(PROJECT, folder, dirs_exist_ok=True)
    for name, text in blocks().items():
        if (not keep or keep in name) and (not leave or leave not in name):
            (folder / name).write_text(text)
    return Project(folder, databases)


def ran(output: str) -> int:
    found = re.search(r"Ran (\d+) tests?|(\d+) passed", output)
    assert found is not None, output
    return int(found[1] or found[2])


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "comments")
UNITTEST = ("manage.py", "test", "--noinput")


def test_sqlite_by_the_runner(tmp_path: Path) -> None:
    site = project(tmp_path, sqlite(tmp_path, mirrors=True), leave=FILES)
    assert ran(site.run(*UNITTEST)) >= 25


def test_sqlite_by_the_runner_in_parallel(tmp_path: Path) -> None:
    site = project(tmp_path, sqlite(tmp_path, mirrors=True), leave=FILES)
    assert ran(site.run(*UNITTEST, "--parallel", "2", "--shuffle")) >= 25


def test_sqlite_by_pytest(tmp_path: Path) -> None:
    site = project(tmp_path, sqlite(tmp_path, mirrors=True), leave=FILES)
    assert ran(site.run(*PYTEST)) >= 30


def test_sqlite_by_pytest_in_parallel(tmp_path: Path) -> None:
    site = project(tmp_path, sqlite(tmp_path, mirrors=True), leave=FILES)
    assert ran(site.run(*PYTEST, "-n", "2")) >= 30


@pytest.mark.parametrize("command", [UNITTEST, PYTEST], ids=["unittest", "pytest"])
def test_files_that_lag_for_ever(tmp_path: Path, command: tuple[str, ...]) -> None:
    site = project(tmp_path, sqlite(tmp_path, mirrors=False), keep=FILES)
    assert ran(site.run(*command)) == 1


def test_page_runs_every_public_tool() -> None:
    code = "".join(blocks().values())
    assert [name for name in testing.__all__ if not re.search(rf"\b{name}\b", code)] == []
