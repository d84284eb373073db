"""How two aliases of DATABASES relate: interchangeable, the same database, a test mirror."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any, Final

from django.db import connections

# The settings and options that define how to reach a server; all others may change what a statement
# returns.
_TRANSPORT: Final = re.compile(
    r"(?:fallback_)?application_name|channel_binding|client_flag|connect_timeout|gssencmode"
    r"|hostaddr|keepalives\w*|load_balance_hosts|passfile|password|pool|port|(?:read|write)_timeout"
    r"|requiressl|server_side_binding|ssl\w*|target_session_attrs|tcp_user_timeout|timeout"
    r"|unix_socket|factory"
)
# Session parameters that change no row that a read returns.
_HARMLESS: Final = re.compile(
    r"\w*_timeout|default_transaction_read_only|transaction_read_only|application_name"
    r"|client_connection_check_interval|max_statement_time|max_execution_time|tcp_\w+"
)
_ASSIGNMENT: Final = re.compile(
    r"(?:SET\s+)?(?:SESSION\s+|@@(?:SESSION\.)?)?(\w+)\s*:?=", re.IGNORECASE
)
# The options that select the server of an alias.
_LOCATION: Final = (
    *("service", "host", "hostaddr", "port", "target_session_attrs", "load_balance_hosts"),
    *("read_default_file", "unix_socket"),
)


def is_interchangeable(one: str, other: str) -> bool:
    """
    Return whether a read returns the same through both aliases, if their servers have the same
    data: same user, role and database, and no other option that changes a row.
    """
    first, second = connections.settings[one], connections.settings[other]
    names = ["ENGINE", "USER", "TIME_ZONE", "AUTOCOMMIT"]
    if connections[one].vendor != "sqlite":
        # The NAME of an SQLite database is its location.
        names.append("NAME")
    if any(first[name] != second[name] for name in names):
        return False
    return dict(_relevant(first["OPTIONS"])) == dict(_relevant(second["OPTIONS"]))


def _relevant(options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if name == "options" and isinstance(value, str):
            # libpq's: "-c statement_timeout=5s -c search_path=shop"
            if parameters := sorted(_relevant_parameters(value)):
                yield name, parameters
        elif name == "init_command" and isinstance(value, str):
            if commands := _relevant_commands(value):
                yield name, commands
        elif not _TRANSPORT.fullmatch(name):
            yield name, value


def _relevant_parameters(options: str) -> Iterator[str]:
    try:
        words = shlex.split(options)
    except ValueError:
        yield options
        return
    for word in words:
        parameter = word.removeprefix("-c").removeprefix("--").strip()
        if parameter and not _HARMLESS.fullmatch(parameter.partition("=")[0].replace("-", "_")):
            yield parameter


def _relevant_commands(text: str) -> list[str]:
    commands = [command.strip() for command in re.split(r"[;,]", text) if command.strip()]
    found = ((command, _ASSIGNMENT.match(command)) for command in commands)
    return [
        command for command, name in found if not (name and _HARMLESS.fullmatch(name[1].lower()))
    ]


def is_testing() -> bool:
    """Return whether Django's test environment is set up, by any test runner."""
    utils = sys.modules.get("django.test.utils")
    return utils is not None and hasattr(utils._TestState, "saved_data")


def is_test_mirror(primary: str, alias: str) -> bool:
    """Return whether an alias is the very database of a primary, as a test runner makes it."""
    if alias == primary:
        return True
    # TEST["MIRROR"] decides: a parallel test worker renames only the databases that it uses.
    if connections.settings[alias]["TEST"].get("MIRROR") == primary and is_testing():
        return True
    return is_same_database(primary, alias)


def is_same_database(one: str, other: str) -> bool:
    """Return whether two aliases have the same server and database, according to the settings."""
    first, second = connections.settings[one], connections.settings[other]
    if first["PORT"] != second["PORT"] or first["HOST"] != second["HOST"]:
        return False
    if first["NAME"] != second["NAME"] or first["ENGINE"] != second["ENGINE"]:
        return False
    # Two in-memory databases of SQLite are two.
    if first["NAME"] == ":memory:":
        return False
    return all(first["OPTIONS"].get(name) == second["OPTIONS"].get(name) for name in _LOCATION)
