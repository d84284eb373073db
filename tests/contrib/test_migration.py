"""Migration from another package, and from a custom router, by changes of settings only."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import MIDDLEWARE, ROUTER

from .legacy_site import REPLICAS

Settings = dict[str, Any]
APPS = ["django.contrib.contenttypes", "django.contrib.auth"]
INSTALLED: Settings = {"INSTALLED_APPS": [*APPS, "pinning_middleware"]}
HERE = "tests.contrib.legacy_site."

MULTIDB: Settings = {
    "INSTALLED_APPS": APPS,
    "DATABASE_ROUTERS": ["multidb.PinningReplicaRouter"],
    "MIDDLEWARE": ["multidb.middleware.PinningRouterMiddleware"],
    "MULTIDB_PINNING_COOKIE": "wrote",
    "MULTIDB_PINNING_SECONDS": 5,
    "REPLICA_DATABASES": REPLICAS,
}
CONTRIB: Settings = {
    **MULTIDB,
    **INSTALLED,
    **{
        name: [f"pinning_middleware.contrib.{MULTIDB[name][0]}"]
        for name in ("DATABASE_ROUTERS", "MIDDLEWARE")
    },
}
RANDOM: Settings = {"INSTALLED_APPS": APPS, "DATABASE_ROUTERS": [f"{HERE}RandomRouter"]}
STICKY: Settings = {
    "INSTALLED_APPS": APPS,
    "DATABASE_ROUTERS": [f"{HERE}StickyRouter"],
    "MIDDLEWARE": [f"{HERE}StickyMiddleware"],
}
OURS: Settings = {
    **INSTALLED,
    "DATABASE_ROUTERS": [ROUTER],
    "MIDDLEWARE": [MIDDLEWARE],
    "PINNING_REPLICAS": REPLICAS,
}


class Found(NamedTuple):
    steps: dict[str, Any]
    checks: list[list[str]]

    @property
    def numbers(self) -> list[str]:
        return sorted(number for number, *_ in self.checks)


Run = Callable[[Settings], Found]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs a site whose replicas lag forever, and returns its results."""

    def run(given: Settings) -> Found:
        if "multidb" in str(given["MIDDLEWARE"]) and importlib.util.find_spec("multidb") is None:
            pytest.skip("The older package is missing: pip install django-multidb-router==0.11")
        folder = tempfile.mkdtemp(dir=tmp_path)
        databases = {
            alias: {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{folder}/{alias}"}
            for alias in ("default", *REPLICAS)
        }
        others = {"DATABASES": databases, "SECRET_KEY": "only for tests", "ALLOWED_HOSTS": ["*"]}
        done = subprocess.run(
            [sys.executable, "-m", "tests.contrib.legacy_site", json.dumps(given | others)],
            cwd=Path(__file__).parents[2],
            env={name: value for name, value in os.environ.items() if "DJANGO" not in name},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Found(**json.loads(done.stdout))

    return run


def steps(cookie: str, redirected: str = "primary: new") -> dict[str, Any]:
    return {
        "before": "replica: ",
        "write": "302 primary: new",
        "redirected": redirected,
        "other": "replica: ",
        "cookies": [cookie],
        "without the cookie": "replica: ",
    }


@pytest.mark.parametrize(
    "given", [MULTIDB, MULTIDB | INSTALLED, CONTRIB], ids=["multidb", "beside ours", "ours"]
)
def test_migration_from_django_multidb_router(given: Settings, run: Run) -> None:
    found = run(given)
    assert found.steps == steps("wrote")
    if given is not CONTRIB and "pinning_middleware" in given["INSTALLED_APPS"]:
        # The remaining changes, in the settings only.
        assert found.numbers == ["W201", "W201", "W201", "W202", "W202"]
        hints = "".join(hint for _, _, hint in found.checks)
        for name in ("DATABASE_ROUTERS", "MIDDLEWARE"):
            assert CONTRIB[name][0] in hints
            assert OURS[name][0] in hints
    else:
        assert found.checks == []


def test_leftovers_of_django_multidb_router(run: Run) -> None:
    found = run(MULTIDB | OURS)
    assert found.steps == steps("pinning")
    assert found.numbers == ["W201"] * 3


@pytest.mark.parametrize("given", [RANDOM, STICKY], ids=["random", "sticky"])
def test_migration_from_a_custom_router(given: Settings, run: Run) -> None:
    """After the change that the check suggests, users see their writes."""
    before = run({"MIDDLEWARE": [], **given, **INSTALLED})
    if given is STICKY:
        assert before.steps == steps("sticky")
    else:
        # It reads from a replica, so the write is missing.
        assert before.steps["write"] == "302 replica: "
        assert before.steps["redirected"] == "replica: "
    ((number, _, hint),) = before.checks
    assert number == "W203"
    written = hint.partition("PINNING_REPLICAS = ")[2].partition("]")[0] + "]"
    assert OURS["DATABASE_ROUTERS"][0] in hint
    after = run(OURS | {"PINNING_REPLICAS": ast.literal_eval(written)})
    assert after.steps == steps("pinning")
    assert after.checks == []


def test_custom_router_after_pinning_router(run: Run) -> None:
    """A router after PinningRouter selects the pool; this one returns a replica."""
    found = run({**OURS, "DATABASE_ROUTERS": [ROUTER, f"{HERE}RandomRouter"]})
    assert "W011" in found.numbers
