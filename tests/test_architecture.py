"""What the package's files may import, and how long they may be."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pinning_middleware

FOLDER = Path(pinning_middleware.__file__).parent
MODULES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
    for path in sorted(FOLDER.rglob("*.py"))
}
PURE = ("sql", "selection", "pins", "state")
# Each alone: nothing else of the package may import them.
LEAVES = ("celery", "tasks", "panels", "testing", "pytest_plugin", "managers", "middleware", "apps")


def imports(path: Path) -> set[str]:
    """Return what a file imports when it is imported, and not for its types only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(absolute(path, node))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def absolute(path: Path, node: ast.ImportFrom) -> set[str]:
    if not node.level:
        return {node.module or ""}
    package = path.parent
    for _ in range(node.level - 1):
        package = package.parent
    base = [*package.relative_to(FOLDER).parts, *(node.module or "").split(".")]
    name = ".".join(part for part in base if part)
    names = {f"{name}.{alias.name}".strip(".") for alias in node.names}
    within = {f"pinning_middleware.{each}" for each in names if each in MODULES}
    return within or {f"pinning_middleware.{name}"}


def own(path: Path) -> set[str]:
    """Return the modules of the package that a file imports."""
    names = {
        name.removeprefix("pinning_middleware.")
        for name in imports(path)
        if name.startswith("pinning_middleware.")
    }
    return {name if name in MODULES else f"{name}.__init__" for name in names}


def test_imports_make_no_circle() -> None:
    graph = {name: own(path) for name, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_no_django(name: str) -> None:
    for module in {name, *own(MODULES[name])}:
        assert not any(
            imported.partition(".")[0] in ("django", "asgiref")
            for imported in imports(MODULES[module])
        )


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf in MODULES])
def test_leaves_are_imported_by_nothing(leaf: str) -> None:
    assert [name for name, path in MODULES.items() if leaf in own(path)] == []


def test_optional_packages_are_no_need_of_the_core() -> None:
    optional = {"celery", "django_tasks", "debug_toolbar", "psycopg", "MySQLdb", "redis", "pytest"}
    for name, path in MODULES.items():
        if name not in LEAVES and not name.startswith("positions."):
            assert not {each.partition(".")[0] for each in imports(path)} & optional, name


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= 450


def test_only_one_place_reads_settings() -> None:
    """`conf` reads them, `checks` judges them."""
    readers = {name for name, path in MODULES.items() if "import settings" in path.read_text()}
    assert readers <= {"conf", "checks"}
