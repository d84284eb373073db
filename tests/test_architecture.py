"""Rules for the modules of the package: imports, patches, and the size of classes."""

from __future__ import annotations

import ast
import gc
import inspect
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.utils.module_loading import import_string

import pinning_middleware
from pinning_middleware.backend.patches import PATCHES, Patch, replace
from pinning_middleware.scopes.scope import PoolState

FOLDER = Path(pinning_middleware.__file__).parent
ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
    for path in sorted(FOLDER.rglob("*.py"))
}
# From the bottom up: each layer may use itself and those below it.
LAYERS: list[tuple[str, ...]] = [
    ("utils",),
    ("pins", "reasons", "exceptions", "signals", "conf", "pool_specs", "tokens", "sql"),
    ("servers", "stores", "scopes"),
    ("routing",),
    ("backend",),
    ("stats", "dry_run_report"),
    (
        "decorators",
        "scope_blocks",
        "handoff",
        "not_found",
        "api",
        "managers",
        "routers",
        "middleware",
        "checks",
        "apps",
    ),
    ("status_page", "urls"),
]
# Parts of one layer that must not use each other: routing combines them.
SEPARATE = ("servers", "stores", "scopes")
# Nothing else of the package may import these.
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
# Modules without Django: names, numbers, times.
PURE = (
    "pins",
    "reasons",
    "routing.affinity",
    "routing.rotation",
    "scopes.overrides",
    "scopes.threads",
    "servers.timelines",
    "sql.__init__",
    "utils.clock",
    "utils.counters",
    "utils.forks",
    "utils.logging",
)
# Modules that may replace attributes of the classes of other packages. The one of the test
# utilities does so inside a context manager only.
PATCHING = (
    "backend.patches",
    "backend.instances",
    "backend.responses",
    "celery",
    "tasks",
    "testing.staleness",
)
MAX_POLICY_LINES = 300
MAX_METHODS = 25
MAX_STATE_FIELDS = 16


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


def layer_of(module: str) -> int | None:
    part = module.partition(".")[0]
    return next((number for number, parts in enumerate(LAYERS) if part in parts), None)


def test_imports_have_no_cycle() -> None:
    """Also not for types or inside functions."""
    graph = {name: own(path) for name, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) >= set(MODULES)


def test_each_module_is_in_a_layer_or_a_leaf() -> None:
    parts = {name.partition(".")[0] for name in MODULES} - {"__init__"}
    assert parts == {part for layer in LAYERS for part in layer} | set(LEAVES)


@pytest.mark.parametrize("name", [name for name in MODULES if layer_of(name) is not None])
def test_layers_use_what_is_below_them(name: str) -> None:
    own_layer = layer_of(name)
    assert own_layer is not None
    above = {
        used
        for used in own(MODULES[name])
        if (layer := layer_of(used)) is None or layer > own_layer
    }
    assert above == set()


@pytest.mark.parametrize("part", SEPARATE)
def test_servers_stores_and_scopes_do_not_use_each_other(part: str) -> None:
    others = set(SEPARATE) - {part}
    for name, path in MODULES.items():
        if name.partition(".")[0] == part:
            assert not {used for used in own(path) if used.partition(".")[0] in others}, name


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_do_not_import_django(name: str) -> None:
    for module in {name, *own(MODULES[name])} - {"__init__"}:
        assert not any(
            imported.partition(".")[0] in ("django", "asgiref")
            for imported in imports(MODULES[module])
        )


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_are_imported_by_nothing(leaf: str) -> None:
    inside = {name for name in MODULES if name == leaf or name.startswith(f"{leaf}.")}
    # The modules of contrib use everything; the pytest plugin uses the test utilities.
    others = {
        name: own(path) & inside
        for name, path in MODULES.items()
        if name not in inside
        and not (name.startswith("contrib.") and leaf != "contrib")
        and (name, leaf) != ("pytest_plugin", "testing")
    }
    assert {name: used for name, used in others.items() if used} == {}


def test_core_does_not_import_optional_packages() -> None:
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


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize("name", MODULES)
def test_classes_have_few_methods(name: str) -> None:
    """Properties are methods, too. A large class has more than one task."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ClassDef) and (name, node.name) != ("conf", "Conf"):
            methods = {
                each.name
                for each in node.body
                if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))
            }
            assert len(methods) <= MAX_METHODS, node.name


def test_state_of_a_pool_has_few_fields() -> None:
    assert len(PoolState._fields) <= MAX_STATE_FIELDS


def test_policy_is_short() -> None:
    assert len(MODULES["routing.policy"].read_text().splitlines()) <= MAX_POLICY_LINES


def test_only_the_policy_decides_and_admits() -> None:
    found = {
        (name, function.name)
        for name, path in MODULES.items()
        for function in functions(ast.parse(path.read_text()))
        if function.name in ("decide", "admit")
    }
    assert found == {("routing.policy", "decide"), ("routing.policy", "admit")}


def test_only_conf_and_checks_read_settings() -> None:
    readers = {name for name, path in MODULES.items() if "import settings" in path.read_text()}
    assert {name.partition(".")[0] for name in readers} <= {"conf", "checks"}


# Changes to other packages


def owner_of(patch: Patch) -> Any:
    try:
        return import_module(patch.owner)
    except ModuleNotFoundError:
        return import_string(patch.owner)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.owner}.{patch.names[0]}")
def test_patches_name_their_owner_reason_and_test(patch: Patch) -> None:
    assert patch.names
    if patch.app == "django" or apps.is_installed(patch.app):
        owner = owner_of(patch)
        for name in patch.names:
            if patch.is_optional and not hasattr(owner, name):
                continue
            assert hasattr(vars(owner)[name], "pinning_original"), "it is not in place"
    assert patch.why.strip()
    assert not patch.ticket or patch.ticket.startswith("https://")
    assert (ROOT / patch.test).is_file()


def test_attribute_that_is_missing_is_not_replaced() -> None:
    class Owner:
        pass

    with pytest.raises(AttributeError, match="moved"):
        replace(Owner, "moved", lambda original: original)


def test_attribute_of_a_base_class_is_wrapped() -> None:
    class Base:
        def run(self) -> str:
            return "base"

    class Owner(Base):
        pass

    replace(Owner, "run", lambda original: lambda self: f"wrapped {original(self)}")
    assert Owner().run() == "wrapped base"
    assert Base().run() == "base"


def test_each_attribute_is_patched_once() -> None:
    replaced = [(patch.owner, name) for patch in PATCHES for name in patch.names]
    assert len(replaced) == len(set(replaced))


def test_only_some_modules_contain_assignments_to_classes_of_other_packages() -> None:
    found = {name for name, path in MODULES.items() if any(foreign_assignments(path))}
    assert found <= set(PATCHING)


def foreign_assignments(path: Path) -> Iterator[str]:
    """Yield assignments to attributes of imported names, and of names that hold a class."""
    tree = ast.parse(path.read_text())
    imported = {"owner", "kind", "base", "cls"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            package = getattr(node, "module", None) or ""
            is_own = getattr(node, "level", 0) or package.startswith("pinning_middleware")
            if not is_own:
                imported |= {(each.asname or each.name).partition(".")[0] for each in node.names}
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(node.args[0], "any")]
        for target in targets:
            if isinstance(target, ast.Attribute):
                holder = ast.unparse(target.value)
                is_imported = holder.partition(".")[0] in imported and "(" not in holder
                if is_imported or holder.startswith("type("):
                    yield ast.unparse(node)


def test_foreign_assignments_are_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    for line in (
        "Model.save = x",
        "db.models.Model.save = x",
        "setattr(Model, name, x)",
        "owner.save = x",
        "type(connection).cursor = x",
    ):
        path.write_text(f"from django.db import models as db, Model\n{line}")
        assert list(foreign_assignments(path)) == [line]
    path.write_text("from pinning_middleware.stores import cache\ncache.x = 1\nself.y = Model")
    assert list(foreign_assignments(path)) == []


def test_only_some_modules_have_functions_in_classes_of_other_packages() -> None:
    found = {
        (f"{module_of(kind)}.{kind.__qualname__}.{name}", source)
        for kind in classes()
        if not module_of(kind).startswith("pinning_middleware")
        for name, source in functions_of_the_package(kind)
    }
    # The replacement functions of the table are defined in their own modules.
    tabled = {
        f"{patch.owner}.{name}": source_of(patch.wrap) for patch in PATCHES for name in patch.names
    }
    assert found
    assert {(n, s) for n, s in found if s not in PATCHING and tabled.get(n) != s} == set()


def classes() -> list[type]:
    # Not isinstance(), which evaluates lazy objects.
    return [each for each in gc.get_objects() if issubclass(type(each), type)]


def module_of(kind: type) -> str:
    # Classes of C extensions may have a descriptor there.
    return str(kind.__module__)


def functions_of_the_package(kind: type) -> Iterator[tuple[str, str]]:
    for name, value in tuple(vars(kind).items()):
        is_method = isinstance(value, (classmethod, staticmethod))
        function: Any = value.__func__ if is_method else value
        # Classes that are derived from one of the package use its functions, too.
        is_replacement = inspect.isfunction(function) and hasattr(function, "pinning_original")
        if is_replacement and (source := source_of(function)) is not None:
            yield name, source


def source_of(function: Any) -> str | None:
    """Return the module of the package that contains the code of a function."""
    code = getattr(function, "__code__", None)
    path = None if code is None else Path(code.co_filename)
    if path is None or not path.is_relative_to(FOLDER):
        return None
    return ".".join(path.relative_to(FOLDER).with_suffix("").parts)
