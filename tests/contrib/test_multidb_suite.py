"""The test suite of django-multidb-router, with only the import path changed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

PACKAGE = "django-multidb-router==0.11"
ARCHIVE = "django_multidb_router-0.11.tar.gz"
DIGEST = "3ae340dbc8f06feed1128d3a4270730c2e9e1f854c02bad4a7e2f90b56114034"
SETTINGS = """
DATABASES = {
    alias: {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    for alias in ("default", "replica")
}
DATABASE_ROUTERS = ["pinning_middleware.contrib.multidb.PinningReplicaRouter"]
INSTALLED_APPS = ["pinning_middleware"]
MIDDLEWARE = ["pinning_middleware.contrib.multidb.middleware.PinningRouterMiddleware"]
REPLICA_DATABASES = ["replica"]
SECRET_KEY = "only for tests"
"""
# Tests that assert a defect of django-multidb-router, and the defect.
DEFECTS: Mapping[str, str] = {
    "MiddlewareTests.test_process_response": (
        "It wants a pin for a POST that wrote nothing. Here a write pins, whatever the method."
    ),
}


@pytest.fixture(scope="module")
def suite() -> str:
    """Return the text of the suite, from the source distribution on PyPI."""
    folder = Path(tempfile.gettempdir()) / f"pinning-tests-sources-{os.getuid()}"
    archive = folder / ARCHIVE
    if not archive.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
        done = subprocess.run(
            [*pip, *options, PACKAGE], capture_output=True, text=True, check=False
        )
        if done.returncode:
            says = f"{PACKAGE} can't be downloaded: {done.stderr[-500:]}"
            if os.environ.get("CI"):
                pytest.fail(says)
            pytest.skip(says)
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == DIGEST
    with tarfile.open(archive) as files:
        text = files.extractfile("django_multidb_router-0.11/multidb/tests.py")
        assert text is not None
        return text.read().decode()


def run(suite: str, folder: Path) -> dict[str, str]:
    """Run pytest in a subprocess; return the outcome of each test."""
    (folder / "suite_settings.py").write_text(SETTINGS)
    moved = re.sub(r"\bmultidb\b", "pinning_middleware.contrib.multidb", suite)
    (folder / "test_suite.py").write_text(moved)
    (folder / "pytest.ini").write_text("[pytest]\n")
    options = ["--ds=suite_settings", "-rA", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_suite.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *_package_path()])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S+?::(\w+)::(\w+)", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    return {f"{case}.{name}": says for says, case, name in found}


def _package_path() -> list[str]:
    """Return the location of the package under test, a checkout or a wheel."""
    import pinning_middleware

    return [str(Path(pinning_middleware.__file__).parents[1])]


def test_multidb_suite_passes_except_known_defects(suite: str, tmp_path: Path) -> None:
    results = run(suite, tmp_path)
    assert len(results) == 25
    assert {name for name, says in results.items() if says != "PASSED"} == set(DEFECTS)
