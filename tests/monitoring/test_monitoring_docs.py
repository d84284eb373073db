"""``docs/monitoring.md`` agrees with the code."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import pinning_middleware
from pinning_middleware import signals, stats, status_page
from pinning_middleware.management import live_check
from pinning_middleware.management.commands import pinning_check, pinning_status
from pinning_middleware.reasons import Reason

FOLDER = Path(pinning_middleware.__file__).parent
# The package may be installed; the page is that of the checkout.
ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "monitoring.md").read_text()
BLOCKS: list[dict[str, Any]] = [
    json.loads(text) for text in re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)
]
LINES = [block for block in BLOCKS if "logger" in block]
SIGNALS = [block for block in BLOCKS if "signal" in block]


def the(key: str) -> dict[str, Any]:
    (block,) = [block for block in BLOCKS if key in block]
    return block


class Line(NamedTuple):
    logger: str
    level: str
    message: str
    extra: frozenset[str]


LEVELS = {"exception": "ERROR"}


@cache
def trees() -> dict[str, ast.Module]:
    return {str(path): ast.parse(path.read_text()) for path in sorted(FOLDER.rglob("*.py"))}


def lines() -> Iterator[Line]:
    """Yield each log call in the source of the package."""
    for tree in trees().values():
        loggers = {
            node.targets[0].id: node.value.args[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "logging.getLogger"
            and isinstance(node.value.args[0], ast.Constant)
        }
        named = {
            node.targets[0].id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (found := _line(node, loggers, named)):
                yield found


def _line(node: ast.Call, loggers: dict[str, Any], named: dict[str, Any]) -> Line | None:
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
                extra = extra | {"unsaid"}
                return Line(loggers[logger.id], level, str(message.value), extra)
    return None


def fits(line: Line, message: str) -> bool:
    return bool(
        re.fullmatch(
            re.escape(line.message).replace("%s", ".+").replace("%r", ".+").replace("%d", "[0-9]+"),
            message,
        )
    )


@pytest.mark.parametrize("block", LINES, ids=lambda block: block["message"])
def test_documented_log_messages_exist_in_the_source(block: dict[str, Any]) -> None:
    extra = frozenset(block) - {"logger", "level", "message"}
    similar = [line for line in lines() if fits(line, block["message"])]
    assert (block["logger"], block["level"], extra) in [
        (line.logger, line.level, line.extra) for line in similar
    ]


def test_log_messages_with_extra_are_documented() -> None:
    """Records with ``extra`` are documented, because sites may process them."""
    for line in lines():
        if line.extra:
            assert any(fits(line, block["message"]) for block in LINES), line


@pytest.mark.parametrize("block", LINES, ids=lambda block: block["message"])
def test_loggers_are_documented(block: dict[str, Any]) -> None:
    assert f"| `{block['logger']}` |" in DOCUMENT


def test_signals_are_documented() -> None:
    sent = {
        ast.unparse(node.func.value).rpartition(".")[2]: {key.arg for key in node.keywords}
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "send_robust"
    }
    documented = {block["signal"]: set(block) - {"signal", "sender"} for block in SIGNALS}
    assert set(documented) == set(signals.__all__)
    for name in set(sent) & set(documented):
        assert documented[name] == sent[name], name


def test_counters_are_documented() -> None:
    assert set(the("fallbacks")) == set(stats.get_stats())
    assert set(the("fallbacks")["pins"]) == set(stats.get_stats()["pins"])
    assert list(the("enabled")["stats"]) == list(stats.get_stats())
    for name in stats.get_stats():
        assert f"| `{name}` |" in DOCUMENT
    named = [
        *the("fallbacks")["reads"]["default"]["replica1"]["10.0.0.2:5432"],
        *the("fallbacks")["fallbacks"]["default"],
    ]
    assert set(named) <= set(Reason)


def test_status_json_is_documented() -> None:
    (row,) = the("enabled")["servers"]
    assert tuple(row) == stats.ServerState._fields
    assert set(the("enabled")["pools"]["default"]) == set(pinning_status._pool("default", []))
    source = inspect.getsource(pinning_status.Command._print_json)
    assert all(f'"{name}":' in source for name in the("enabled"))


def test_check_json_is_documented() -> None:
    pool = the("checks")["pools"]["default"]
    (found,) = pool["replicas"]
    assert tuple(found) == live_check.ReplicaResult._fields
    assert tuple(found["samples"][0]) == (*live_check.Sample._fields, "correct")
    assert tuple(pool["missing_privileges"][0]) == live_check.MissingPrivilege._fields
    source = inspect.getsource(pinning_check)
    assert all(f'"{name}"' in source for name in [*the("checks"), *the("checks")["checks"][0]])


def test_options_and_faults_are_documented() -> None:
    for command in (pinning_status, pinning_check):
        parser = command.Command().create_parser("manage.py", "pinning")
        own = {"--json", "--watch", "--live", "--pool", "--timeout"}
        for option in own & set(parser._option_string_actions):
            assert option in DOCUMENT
    for reason in status_page.FAULTS:
        assert f"`{reason}`" in DOCUMENT


def test_links_are_valid() -> None:
    titles = re.findall(r"^##+ (.+)$", DOCUMENT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([\w-]+)\)", DOCUMENT)) <= anchors
    for name in re.findall(r"\]\((?!#|http)([^)#]+)", DOCUMENT):
        assert (ROOT / "docs" / name).exists(), name
