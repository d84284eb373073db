"""Checks that connect: to the databases that they are given, and to the cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from django.core.checks import CheckMessage, Tags, register
from django.db import DatabaseError, InterfaceError

from pinning_middleware.checks.messages import error, warning
from pinning_middleware.checks.project import CACHE_STORE, has_store
from pinning_middleware.conf import conf
from pinning_middleware.servers.connect import dedicated_connection
from pinning_middleware.servers.probe import endpoint_for, probe
from pinning_middleware.stores.redis_pins import redis_pins


@register(Tags.database)
def check_balanced_by_a_pooler(
    databases: Sequence[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    messages: list[CheckMessage] = []
    for alias in databases or ():
        is_primary = alias in conf.replicas
        if not is_primary and alias not in conf.readonly_aliases:
            continue
        if not _splits_reads_and_writes(alias):
            continue
        what = f"{alias!r} resolves to pgpool-II with load_balance_mode = on"
        hint = "Set load_balance_mode = off in pgpool-II for this alias"
        if is_primary:
            messages.append(
                error(
                    "E025",
                    f"{what}, so a standby answers reads that were sent to the primary.",
                    f"{hint}, or begin every read of the primary with /*NO LOAD BALANCE*/.",
                )
            )
        else:
            messages.append(
                warning("W019", f"{what}, so its replication position is ignored.", f"{hint}.")
            )
    return messages


def check_evictions() -> list[CheckMessage]:
    """
    Warn if the server of the cache has evicted keys: a missing pin alone does not show that. Called
    by ``pinning_check --live``.
    """
    redis = redis_pins() if has_store(CACHE_STORE) else None
    evicted = 0 if redis is None else redis.evicted_keys()
    if not evicted:
        return []
    return [
        warning(
            "W034",
            f"The server of cache {conf.cache!r} has evicted {evicted} keys since its start, and "
            "pins may have been among them.",
            "Give it more memory, or set PINNING_CACHE to a cache on a server whose "
            "maxmemory-policy is noeviction.",
        )
    ]


def _splits_reads_and_writes(alias: str) -> bool:
    """Return whether a pooler sends reads to any of its servers. An unreachable one is no error."""
    with closing(dedicated_connection(alias)) as connection:
        try:
            probe(connection, is_trial=True)
        except (DatabaseError, InterfaceError):
            return False
        return bool(endpoint_for(connection).splits_reads_and_writes)
