"""Connecting takes no longer than a site can stand, whatever the driver's own patience is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf

from .positions import family_of
from .questions import link_of

__all__ = ["CONNECT_TIMEOUT", "bound", "refused"]

# Seconds. Drivers otherwise wait for minutes; a value in OPTIONS has its way.
CONNECT_TIMEOUT = 2

# Aliases that a test has made unreachable.
refused: set[str] = set()


def bound(connection: BaseDatabaseWrapper) -> None:
    """Let attempts of this connection, and its wait for Django's pool, end after a while."""
    family = family_of(connection)
    if family is None:
        return
    made: Any = connection
    made.get_connection_params = functools.partial(
        _parameters, connection, family.connect_timeout, made.get_connection_params
    )
    made.get_new_connection = functools.partial(_connect, made, made.get_new_connection)


def _is_ours(connection: BaseDatabaseWrapper) -> bool:
    """Return whether somebody else could serve, or nobody is to wait."""
    alias = connection.alias
    return (
        alias in conf.primary_of
        or "_pinning_private" in connection.__dict__
        or (conf.primary_down == "stale" and alias in conf.replicas)
    )


def _parameters(
    connection: BaseDatabaseWrapper, option: str, parameters: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    chosen = parameters()
    if _is_ours(connection):
        chosen.setdefault(option, CONNECT_TIMEOUT)
    return chosen


def _connect(connection: Any, connect: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    if connection.alias in refused:
        raise OperationalError(f"{connection.alias} was cut off by a test")
    options = connection.settings_dict["OPTIONS"].get("pool")
    if (
        options
        and _is_ours(connection)
        and not (isinstance(options, dict) and "timeout" in options)
    ):
        # It waits for its own thread, which bounds nothing.
        pool = connection.pool
        pool.timeout = min(pool.timeout, CONNECT_TIMEOUT)
    raw = connect(parameters)
    if _is_ours(connection):
        # Before Django sets its session up, which is a wait too.
        link_of(connection, raw)
    return raw
