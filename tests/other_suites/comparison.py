"""What the suites have in common: sources, servers, the two runs and their comparison."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

from sample_site.cluster import Cluster
from tests.real.layouts.versions import NEWEST, installation

ROOT: Final = Path(__file__).resolve().parents[2]
APP: Final = "pinning_middleware"
MIDDLEWARE: Final = "pinning_middleware.middleware.PinningMiddleware"
# Settings of the second run.
ROUTED: Final = {
    "DATABASE_ROUTERS": ["pinning_middleware.routers.PinningRouter"],
    "PINNING_REPLICAS": ["replica"],
}


class Outcome(NamedTuple):
    """A run: its closing line, the tests that failed, and where its output is."""

    summary: str
    failed: set[str]
    log: Path


@contextmanager
def open_folder(name: str) -> Iterator[Path]:
    """A temporary folder that servers of another user may enter."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def sdist(package: str, folder: Path) -> Path:
    """Download the sdist of the installed version of a package; return its folder."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    wanted = f"{package}=={version(package)}"
    subprocess.run([*pip, "--no-deps", "--no-binary=:all:", "--dest", folder, wanted], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def replaced(text: str, old: str, new: str) -> str:
    """Replace a part of a source, which must be there once."""
    if text.count(old) != 1:
        sys.exit(f"{old!r} occurs {text.count(old)} times: the suite has changed")
    return text.replace(old, new)


@contextmanager
def mirrored_databases(folder: Path, aliases: Iterable[str]) -> Iterator[dict[str, dict[str, Any]]]:
    """Return DATABASES with these aliases, and `replica` as a mirror of `default`."""
    # The wheel of PostgreSQL has neither ICU nor the contrib modules.
    path = installation(NEWEST)
    with Cluster(folder / "cluster", 0, keep=False, installation=path) as cluster:
        databases = {}
        for alias in aliases:
            cluster.create_database(f"suite_{alias}")
            databases[alias] = cluster.database("primary", f"suite_{alias}")
        yield databases | {"replica": databases["default"] | {"TEST": {"MIRROR": "default"}}}


def run(
    name: str, command: Sequence[str], folder: Path, summary: str, failed: str, **environ: str
) -> Outcome:
    """Run a suite; `summary` and `failed` are the patterns of its output."""
    paths = os.pathsep.join((str(folder), str(ROOT)))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    found = re.search(summary, done.stdout, re.MULTILINE)
    if found is None:
        sys.exit(f"The tests did not run:\n{done.stdout[-4000:]}")
    log = Path(tempfile.gettempdir()) / f"{name}.log"
    log.write_text(done.stdout)
    outcome = Outcome(found[0], set(re.findall(failed, done.stdout, re.MULTILINE)), log)
    print(f"{name}: {outcome.summary}, {len(outcome.failed)} failed", flush=True)
    return outcome


def compare(
    before: Outcome,
    after: Outcome,
    known: Collection[str],
    name_of: Callable[[str], str] = lambda test: test,
) -> None:
    """Exit with an error if a test fails with the package only and is not in `known`."""
    new = after.failed - before.failed
    unexpected = sorted(test for test in new if not name_of(test).endswith(tuple(known)))
    print(f"with the package only: {len(new)}, of which {len(unexpected)} are unexpected")
    if unexpected:
        print(*unexpected, sep="\n")
        sys.exit(f"{len(unexpected)} tests fail with the package only; see {after.log}")
