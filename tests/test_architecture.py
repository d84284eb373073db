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
# From the ground up: each floor may use those below it, and itself.
FLOORS: list[tuple[str, ...]] = [
    ("utils",),
    ("pins", "reasons", "exceptions", "signals", "conf", "tokens", "sql"),
    ("servers",),
    ("stores",),
    ("scopes",),
    ("routing",),
    ("backend",),
    ("stats",),
    ("decorators", "scope_blocks", "api", "managers", "routers", "middleware", "checks", "apps"),
    ("status_page", "urls"),
]
# Each alone: nothing else of the package may import them.
LEAVES = (
    "celery",
    "tasks",
    "managers",
    "middleware",
    "apps",
    "contrib",
    "testing",
    "pytest_plugin",
    "management",
    "panels",
)
# These know no Django: names, numbers, times.
PURE = ("pins", "sql", "routing.rotation", "reasons")


def imports(path: Path) -> set[str]:
    """Return what a file imports, also inside functions and for its types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(absolute(path, node))
    return found


def absolute(path: Path, node: ast.ImportFrom) -> set[str]:
    if node.level:
        package = path.parent
        for _ in range(node.level - 1):
            package = package.parent
        base = [*package.relative_to(FOLDER).parts, *(node.module or "").split(".")]
    elif (node.module or "").partition(".")[0] == "pinning_middleware":
        base = (node.module or "").split(".")[1:]
    else:
        return {node.module or ""}
    name = ".".join(part for part in base if part)
    names = {f"{name}.{alias.name}".strip(".") for alias in node.names}
    within = {each for each in names if each in MODULES or f"{each}.__init__" in MODULES}
    return {f"pinning_middleware.{each}" for each in within or {name}}


def own(path: Path) -> set[str]:
    """Return the modules of the package that a file imports."""
    names = {
        name.removeprefix("pinning_middleware.")
        for name in imports(path)
        if name.startswith("pinning_middleware.")
    }
    return {name if name in MODULES else f"{name}.__init__" for name in names}


def floor_of(module: str) -> int | None:
    room = module.partition(".")[0]
    return next((level for level, rooms in enumerate(FLOORS) if room in rooms), None)


def test_imports_make_no_circle() -> None:
    """Neither by types nor inside functions."""
    graph = {name: own(path) for name, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) >= set(MODULES)


@pytest.mark.parametrize("name", [name for name in MODULES if floor_of(name) is not None])
def test_rooms_use_what_stands_below_them(name: str) -> None:
    floor = floor_of(name)
    assert floor is not None
    above = {
        used for used in own(MODULES[name]) if (level := floor_of(used)) is None or level > floor
    }
    assert above == set()


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_no_django(name: str) -> None:
    for module in {name, *own(MODULES[name])} - {"__init__"}:
        assert not any(
            imported.partition(".")[0] in ("django", "asgiref")
            for imported in imports(MODULES[module])
        )


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_are_imported_by_nothing(leaf: str) -> None:
    inside = {name for name in MODULES if name == leaf or name.startswith(f"{leaf}.")}
    # What is contributed stands on top of everything; pytest's door leads to the tools for tests.
    others = {
        name: own(path) & inside
        for name, path in MODULES.items()
        if name not in inside
        and not (name.startswith("contrib.") and leaf != "contrib")
        and (name, leaf) != ("pytest_plugin", "testing")
    }
    assert {name: used for name, used in others.items() if used} == {}


def test_optional_packages_are_no_need_of_the_core() -> None:
    optional = {
        "MySQLdb",
        "celery",
        "debug_toolbar",
        "django_tasks",
        "health_check",
        "opentelemetry",
        "prometheus_client",
        "psycopg",
        "pytest",
        "redis",
    }
    leaves = {name for name in MODULES if name.partition(".")[0] in LEAVES}
    for name in set(MODULES) - leaves:
        found = {each.partition(".")[0] for each in at_import(MODULES[name])} & optional
        assert not found, name


def at_import(path: Path) -> set[str]:
    """Return what a file imports when it is imported."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= 480


def test_only_one_place_reads_settings() -> None:
    """`conf` reads them, `checks` judges them."""
    readers = {name for name, path in MODULES.items() if "import settings" in path.read_text()}
    assert {name.partition(".")[0] for name in readers} <= {"conf", "checks"}
