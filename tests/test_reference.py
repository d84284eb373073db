"""The lists in ``docs/reference`` are those of the code."""

from __future__ import annotations

import ast
import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from django.db import DatabaseError
from django.dispatch import Signal
from django.utils.module_loading import import_string

import pinning_middleware
from pinning_middleware import (
    exceptions,
    managers,
    pytest_plugin,
    signals,
    stats,
    stores,
    testing,
    tokens,
)
from pinning_middleware.conf import DEFAULTS
from pinning_middleware.management import live_check
from pinning_middleware.management.commands import pinning_check, pinning_status
from pinning_middleware.pins import POSITION_LIFETIME
from pinning_middleware.reasons import Fault, Reason

from .contrib.pages import DOCS

PACKAGE = Path(pinning_middleware.__file__).parent
REFERENCE = DOCS / "reference"
ROOT = DOCS.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CODE = re.compile(r"`([^`]+)`")


def page(name: str) -> str:
    return (REFERENCE / f"{name}.md").read_text()


def rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables, without their headings."""
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("|") and not line.startswith("|-") and not following.startswith("|-"):
            yield [cell.strip() for cell in line[1:].removesuffix("|").split("|")]


def section(text: str, heading: str) -> str:
    level = heading.partition(" ")[0]
    after = text.partition(f"\n{heading}\n")[2]
    assert after, f"{heading!r} is missing"
    return re.split(rf"\n#{{1,{len(level)}}} ", after)[0]


def headings(text: str, level: int) -> list[str]:
    return re.findall(rf"^{'#' * level} (.+)$", text, re.MULTILINE)


def blocks_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


@cache
def trees() -> dict[str, ast.Module]:
    return {str(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


# Settings


def test_settings_table_has_every_setting_with_its_default() -> None:
    table = page("settings").partition("\n## ")[0]
    found = {CODE.findall(name)[0]: CODE.findall(default)[0] for name, default, _ in rows(table)}
    assert {name: ast.literal_eval(default) for name, default in found.items()} == DEFAULTS


def test_each_setting_has_one_section() -> None:
    assert sorted(headings(page("settings"), 3)) == sorted(DEFAULTS)


# Checks

ID = re.compile(r'"(?:pinning_middleware\.)?([EW]\d{3})"')


def test_every_check_has_cause_and_remedy_and_no_other_is_documented() -> None:
    ids = {each for path in PACKAGE.rglob("*.py") for each in ID.findall(path.read_text())}
    documented = headings(page("checks"), 3)
    assert sorted(documented) == sorted(ids)
    for each in documented:
        text = section(page("checks"), f"### {each}")
        assert text.strip().startswith("**"), each
        assert "\n- Cause: " in text, each
        assert "\n- Remedy: " in text, each


# Reasons, signals, exceptions


def test_reasons_are_documented() -> None:
    reads = section(page("reasons"), "## Reads")
    assert sorted(CODE.findall(row[0])[0] for row in rows(reads)) == sorted(Reason)
    faults = section(page("reasons"), "## Servers out of rotation")
    assert {CODE.findall(row[0])[0] for row in rows(faults)} == {*Fault, stats.DRAINED}


def sent_arguments() -> dict[str, set[str | None]]:
    """Return the arguments with which the package sends each of its signals."""
    return {
        ast.unparse(node.func.value).rpartition(".")[2]: {key.arg for key in node.keywords}
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "send_robust"
    }


def test_signals_are_documented_with_their_arguments() -> None:
    text = page("signals")
    assert sorted(headings(text, 2)) == sorted(signals.__all__)
    for name, arguments in sent_arguments().items():
        if isinstance(getattr(signals, name, None), Signal):
            documented = [CODE.findall(row[0])[0] for row in rows(section(text, f"## {name}"))]
            assert set(documented) == arguments, name


def test_exceptions_are_documented_with_their_base() -> None:
    own = {
        CODE.findall(row[0])[0]: CODE.findall(row[1])[0]
        for row in rows(page("exceptions"))
        if "pinning_middleware" in row[0]
    }
    for path, base in own.items():
        kind = import_string(path)
        assert issubclass(kind, Exception)
        assert kind.__base__.__name__ == base.rpartition(".")[2]
    public = {*exceptions.__all__}
    public |= {name for name in testing.__all__ if _is_exception(getattr(testing, name))}
    assert {path.rpartition(".")[2] for path in own} == public
    assert issubclass(pinning_middleware.ReplicaWriteError, DatabaseError)


def _is_exception(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


# Stores


def test_stores_are_documented() -> None:
    shipped = {
        name
        for name in stores.__all__
        if isinstance(store := getattr(stores, name), type)
        and store not in (stores.BaseStore, stores.TokenStore)
    }
    table = page("stores").partition("\n## ")[0]
    assert {CODE.findall(row[0])[0] for row in rows(table)} == shipped
    assert shipped <= set(headings(page("stores"), 2))


# Functions

DIRECTIVE = re.compile(r"^\.\. autofunction:: pinning_middleware\.([\w.]+)\((.*)\)$", re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "parameters"),
    DIRECTIVE.findall(page("api")) + DIRECTIVE.findall(page("testing")),
)
def test_documented_signature_is_that_of_the_function(name: str, parameters: str) -> None:
    function = import_string(f"pinning_middleware.{name}")
    signature = inspect.signature(function)
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    expected = signature.replace(parameters=plain, return_annotation=inspect.Signature.empty)
    assert f"({parameters})" == str(expected).replace("'", '"')


def test_every_public_name_is_documented() -> None:
    named = set(headings(page("api"), 3))
    assert named == set(pinning_middleware.__all__) - {"ReplicaWriteError"}
    assert "`ReplicaWriteError`" in page("api")


def test_documented_modules_exist() -> None:
    """They are not imported, since some need the package of an extra."""
    for name, _ in rows(section(page("api"), "## Other modules")):
        path = PACKAGE.parent / CODE.findall(name)[0].replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), path


def test_every_test_utility_is_documented() -> None:
    text = page("testing")
    for name in testing.__all__:
        assert f"pinning_middleware.testing.{name}(" in text or f"### {name}\n" in text, name
    fixtures = [CODE.findall(row[0])[0] for row in rows(section(text, "## pytest"))]
    assert sorted(fixtures) == sorted(pytest_plugin.__all__)


def test_names_of_the_legacy_interface_are_documented() -> None:
    found = {
        name for row in rows(page("legacy")) for cell in row[:2] for name in CODE.findall(cell)
    }
    assert found == set(managers.__all__)


# Tokens


def test_limits_of_tokens_are_documented() -> None:
    assert f"{tokens.MAX_LENGTH} characters" in page("tokens")
    assert POSITION_LIFETIME == 24 * 3600


def test_causes_of_rejection_are_documented() -> None:
    source = inspect.getsource(tokens)
    causes = re.findall(r'InvalidToken\("(\w+)"\)', source)
    documented = rows(section(page("tokens"), "## Rejected tokens"))
    assert {CODE.findall(row[0])[0] for row in documented} == set(causes)


# Log records


class Line(NamedTuple):
    logger: str
    level: str
    message: str
    extra: frozenset[str]


LEVELS = {"exception": "ERROR"}


def log_calls() -> Iterator[Line]:
    """Yield each log call in the source of the package."""
    for tree in trees().values():
        named = {
            node.targets[0].id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        loggers = {
            name: str(ast.literal_eval(value.args[0]))
            for name, value in named.items()
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "logging.getLogger"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (found := _line(node, loggers, named)):
                yield found


def _line(node: ast.Call, loggers: dict[str, str], named: dict[str, Any]) -> Line | None:
    extra: frozenset[str] = frozenset()
    for keyword in node.keywords:
        value = keyword.value
        if keyword.arg == "extra":
            value = named.get(value.id) if isinstance(value, ast.Name) else value
            if isinstance(value, ast.Dict):
                extra = frozenset(str(ast.literal_eval(key)) for key in value.keys if key)
    match node.func:
        case ast.Attribute(value=ast.Name(id=name), attr=level) if name in loggers and node.args:
            message = node.args[0]
            if isinstance(message, ast.Constant):
                known = LEVELS.get(level, level.upper())
                return Line(loggers[name], known, str(message.value), extra)
        case ast.Name(id="log_rate_limited"):
            logger, how, _, message = node.args[:4]
            if isinstance(logger, ast.Name) and isinstance(message, ast.Constant):
                level = ast.unparse(how).rpartition(".")[2]
                extra = extra | {"suppressed"}
                return Line(loggers[logger.id], level, str(message.value), extra)
    return None


def test_log_records_are_those_of_the_source() -> None:
    text, documented = page("logging"), set[Line]()
    for logger in headings(text, 2):
        for level, message, fields, _ in rows(section(text, f"## {logger}")):
            plain = re.sub(r"\{\w+\}", "{}", message.strip("`"))
            documented.add(Line(logger, level, plain, frozenset(CODE.findall(fields))))
    assert documented == {
        line._replace(message=re.sub(r"%[srd]", "{}", line.message)) for line in log_calls()
    }


def test_loggers_are_documented() -> None:
    table = page("logging").partition("\n## ")[0]
    found = {line.logger for line in log_calls()}
    assert {CODE.findall(row[0])[0] for row in rows(table)} == found
    (example,) = blocks_of(page("logging"))
    assert set(example) > {"logger", "level", "message"}


# Counters, commands


def test_counters_are_documented() -> None:
    (example,) = blocks_of(page("metrics"))
    current = stats.get_stats()
    assert list(example) == list(current)
    assert set(example["pins"]) == set(current["pins"])
    table = section(page("metrics"), "## get_stats")
    assert [CODE.findall(row[0])[0] for row in rows(table)] == list(current)
    used = [*example["reads"]["default"]["replica1"]["10.0.0.2:5432"]]
    assert {*used, *example["fallbacks"]["default"]} <= set(Reason)


def test_json_of_pinning_status_is_documented() -> None:
    (example,) = blocks_of(section(page("commands"), "### JSON of pinning_status"))
    (row,) = example["servers"]
    assert tuple(row) == stats.ServerState._fields
    assert set(example["pools"]["default"]) == set(pinning_status._pool("default", []))
    assert list(example["stats"]) == list(stats.get_stats())
    source = inspect.getsource(pinning_status.Command._print_json)
    assert all(f'"{name}":' in source for name in example)
    fields = section(page("commands"), "### Fields of a server")
    named = [name for row in rows(fields) for name in CODE.findall(row[0])]
    assert sorted(named) == sorted(stats.ServerState._fields)


def test_json_of_pinning_check_is_documented() -> None:
    (example,) = blocks_of(section(page("commands"), "### JSON of pinning_check"))
    pool = example["pools"]["default"]
    (found,) = pool["replicas"]
    assert tuple(found) == live_check.ReplicaResult._fields
    assert tuple(found["samples"][0]) == (*live_check.Sample._fields, "correct")
    assert tuple(pool["missing_privileges"][0]) == live_check.MissingPrivilege._fields
    source = inspect.getsource(pinning_check)
    assert all(f'"{name}"' in source for name in [*example, *example["checks"][0]])


def test_table_of_pinning_status_is_documented() -> None:
    example = section(page("commands"), "## pinning_status")
    headings_of_table = " ".join(pinning_status.HEADINGS)
    assert headings_of_table in {" ".join(line.split()) for line in example.splitlines()}


@pytest.mark.parametrize("command", [pinning_status, pinning_check])
def test_options_of_commands_are_documented(command: Any) -> None:
    name = command.__name__.rpartition(".")[2]
    text = section(page("commands"), f"## {name}")
    parser = command.Command().create_parser("manage.py", name)
    own = parser._option_string_actions.keys() - _options_of_django()
    assert {row[0].strip("`").split()[0] for row in rows(text) if row[0].startswith("`--")} == own


def _options_of_django() -> set[str]:
    from django.core.management.base import BaseCommand

    return set(BaseCommand().create_parser("manage.py", "any")._option_string_actions)


# Versions


def test_supported_versions_are_those_of_the_package_metadata() -> None:
    supported = {row[0]: row[1] for row in rows(page("versions").partition("\n## ")[0])}
    for name, prefix in (
        ("Python", "Programming Language :: Python :: 3."),
        ("Django", "Framework :: Django :: "),
    ):
        start = prefix.removesuffix("3.")
        versions = [
            entry.removeprefix(start)
            for entry in PROJECT["classifiers"]
            if entry.startswith(prefix)
        ]
        assert supported[name] == ", ".join(versions)
    assert any(
        entry == f"asgiref>={supported['asgiref'].split()[0]}" for entry in PROJECT["dependencies"]
    )


def test_extras_are_those_of_the_package_metadata() -> None:
    table = section(page("versions"), "## Extras")
    documented = {CODE.findall(row[0])[0]: row[1] for row in rows(table)}
    extras: dict[str, list[str]] = PROJECT["optional-dependencies"]
    assert set(documented) == set(extras)
    for name, text in documented.items():
        (minimum,) = set(re.findall(r">=([\d.]+)", extras[name][0]))
        assert f" {minimum} and later" in text, name
