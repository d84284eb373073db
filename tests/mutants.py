"""
Mutation testing with cosmic-ray: change an operator, a number or a keyword of a module, run its
tests, and list the changes that no test notices:

    python -m tests.mutants [--sample N] [module ...]

Works on copies of the tree. Left out are changes without an effect: of annotations, which are not
evaluated, of the sizes of caches, and of ``is`` to ``==``. A sample is the same one each time.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
COPIED: Final = ("pinning_middleware", "tests", "sample_site", "docs", "README.md", "setup.cfg")
# Module → the tests that are to notice its mutants; those without real servers.
TESTS: Final = {
    "pins": "tests/test_pins.py",
    "tokens": "tests/test_tokens.py tests/test_token_laws.py",
    "sql/__init__": "tests/test_sql.py tests/test_sql_laws.py",
    "routing/rotation": "tests/routing/test_rotation.py tests/routing/test_affinity.py",
    "routing/outgoing": (
        "tests/routing/test_outgoing.py tests/test_keyed.py tests/scopes tests/test_scopes.py "
        "tests/test_stores.py"
    ),
    "routing/policy": (
        "tests/test_routers.py tests/test_scopes.py tests/test_pools.py tests/test_api.py "
        "tests/test_replica_choice.py tests/scopes tests/test_middleware.py "
        "tests/test_explicit_replicas.py"
    ),
    "backend/writes": "tests/backend tests/test_writes.py tests/scopes tests/test_scopes.py",
}
CONFIG: Final = """
[cosmic-ray]
module-path = "{module}"
timeout = 120.0
test-command = "{python} -m pytest -qx -p no:cacheprovider --hypothesis-profile=mutants {tests}"
[cosmic-ray.distributor]
name = "local"
"""


# These compare None, members of enums, and values whose identity only saves work.
EQUIVALENT: Final = ("_Is_Eq", "_IsNot_NotEq")


def without_effect(source: str) -> set[tuple[int, int]]:
    """Return the positions (line, column) of annotations and of the sizes of caches."""
    tree = list(ast.walk(ast.parse(source)))
    nodes = [
        annotation
        for node in tree
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if isinstance(annotation, ast.expr)
    ]
    nodes += [
        node.value for node in tree if isinstance(node, ast.keyword) and node.arg == "maxsize"
    ]
    return {
        (line, column)
        for node in nodes
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for column in range(
            node.col_offset if line == node.lineno else 0,
            (node.end_col_offset or 0) if line == node.end_lineno else 200,
        )
    }


def choose(session: Path, source: str, sample: int | None) -> None:
    """Delete the mutants that are not to be tested."""
    ignored = without_effect(source)
    with sqlite3.connect(session) as database:
        rows = database.execute(
            "SELECT job_id, start_pos_row, start_pos_col FROM mutation_specs ORDER BY job_id"
        ).fetchall()
        places = sorted(
            database.execute(
                "SELECT operator_name, occurrence, start_pos_row, start_pos_col, job_id "
                "FROM mutation_specs"
            )
        )
        jobs = [
            job
            for operator, _, row, column, job in places
            if (row, column) not in ignored and not operator.endswith(EQUIVALENT)
        ]
        kept = set(random.Random(1).sample(jobs, min(sample or len(jobs), len(jobs))))
        for job, *_ in rows:
            if job not in kept:
                for table in ("mutation_specs", "work_items"):
                    database.execute(f"DELETE FROM {table} WHERE job_id = ?", [job])


def test(module: str, sample: int | None) -> tuple[int, list[str]]:
    """Return the number of mutants, and the changes that no test noticed."""
    path = f"pinning_middleware/{module}.py"
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [shutil.which("cosmic-ray", path=places) or sys.exit("cosmic-ray is missing")]
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        config, session = folder / "config.toml", folder / "session.sqlite"
        config.write_text(CONFIG.format(module=path, python=sys.executable, tests=TESTS[module]))
        run = partial(
            subprocess.run, cwd=folder, check=True, env=os.environ | {"PYTHONPATH": str(folder)}
        )
        run([*command, "baseline", config])
        run([*command, "init", config, session])
        choose(session, (ROOT / path).read_text(), sample)
        run([*command, "exec", config, session])
        with sqlite3.connect(session) as database:
            results = database.execute("SELECT test_outcome, diff FROM work_results").fetchall()
    return len(results), [diff for outcome, diff in results if "SURVIVED" in str(outcome)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="mutants of each module")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    options = parser.parse_args()
    with ThreadPoolExecutor(options.processes) as executor:
        for module, (number, survivors) in zip(
            options.modules,
            executor.map(partial(test, sample=options.sample), options.modules),
            strict=True,
        ):
            print(f"{module}: {number - len(survivors)} of {number} killed", flush=True)
            for diff in survivors:
                changed = [line for line in diff.splitlines() if line[:1] in ("-", "+", "@")]
                print(*changed[2:], sep="\n", flush=True)


if __name__ == "__main__":
    main()
