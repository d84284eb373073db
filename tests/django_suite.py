"""
Run Django's own tests on a real PostgreSQL whose replica is a test mirror:

    python -m tests.django_suite [labels]

Twice: with the mirror alone, and with the package beside it. Fails if a test fails only with the
package. The tests are those of the installed Django, from its sdist. KNOWN lists the tests that
cannot pass, each with the reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import django

from sample_site.cluster import Cluster
from tests.real.layouts.versions import NEWEST, installation

ROOT = Path(__file__).resolve().parent.parent
KNOWN: dict[str, str] = {}
PROCESSES = os.environ.get("PROCESSES", "2")
SETTINGS = """
from test_sqlite import *

DATABASES = {{
    "default": {default!r},
    "other": {other!r},
    "replica": {default!r} | {{"TEST": {{"MIRROR": "default"}}}},
}}
"""
ROUTED = """
DATABASE_ROUTERS = ["pinning_middleware.routers.PinningRouter"]
PINNING_REPLICAS = ["replica"]
"""
FAILED = re.compile(r"^(?:FAIL|ERROR): (.+)$", re.MULTILINE)


def sources(folder: Path) -> Path:
    """Return the folder of Django's tests, after downloading them."""
    wanted = f"django=={django.__version__}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-binary=:all:", "--dest", folder, wanted], check=True)
    (archive,) = folder.glob("[dD]jango-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (tests,) = folder.glob("[dD]jango-*/tests")
    # It expects the names of all aliases, and its error cannot be sent to the main process.
    scripts = tests / "admin_scripts" / "tests.py"
    name = "test_invalid_choice_db_option"
    scripts.write_text(scripts.read_text().replace(f"def {name}", f"def not_run_{name}"))
    # runtests.py sets INSTALLED_APPS and MIDDLEWARE itself.
    text = (tests / "runtests.py").read_text()
    text = text.replace(
        "ALWAYS_INSTALLED_APPS = [", 'ALWAYS_INSTALLED_APPS = ["pinning_middleware",'
    )
    middleware = '"pinning_middleware.middleware.PinningMiddleware"'
    text = text.replace("ALWAYS_MIDDLEWARE = [", f"ALWAYS_MIDDLEWARE = [{middleware},")
    (tests / "runtests_pinning.py").write_text(text)
    return tests


def run(tests: Path, runner: str, settings: str, labels: list[str]) -> set[str]:
    """Run the suite and return the tests that failed."""
    (tests / f"settings_{runner}.py").write_text(settings)
    command = [sys.executable, f"{runner}.py", f"--settings=settings_{runner}", "--noinput"]
    done = subprocess.run(
        [*command, f"--parallel={PROCESSES}", *labels],
        cwd=tests,
        env=os.environ | {"PYTHONPATH": f"{tests}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    Path(tests.parent.parent / f"{runner}.log").write_text(done.stdout)
    summary = re.search(r"^Ran \d+ tests.*$", done.stdout, re.MULTILINE)
    if summary is None:
        sys.exit(f"The tests did not run:\n{done.stdout[-4000:]}")
    failed = set(FAILED.findall(done.stdout))
    print(f"{runner}: {summary[0]}, {len(failed)} failed", flush=True)
    return failed


def main(labels: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="django-suite-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        tests = sources(folder)
        # The wheel of PostgreSQL has neither ICU nor the contrib modules.
        path = installation(NEWEST)
        with Cluster(folder / "cluster", 0, keep=False, installation=path) as cluster:
            for database in ("django_default", "django_other"):
                cluster.create_database(database)
            settings = SETTINGS.format(
                default=cluster.database("primary", "django_default"),
                other=cluster.database("primary", "django_other"),
            )
            before = run(tests, "runtests", settings, labels)
            after = run(tests, "runtests_pinning", settings + ROUTED, labels)
        new = sorted(test for test in after - before if test not in KNOWN)
        if new:
            log = (folder / "runtests_pinning.log").read_text()
            keep = Path(tempfile.gettempdir()) / "django-suite.log"
            keep.write_text(log)
            print(*new, sep="\n")
            sys.exit(f"{len(new)} tests fail with the package only; see {keep}")


if __name__ == "__main__":
    main(sys.argv[1:])
