"""
The names of django-multidb-router 0.11 over this package, for a site that moves over.

In its settings the site writes ``pinning_middleware.contrib.multidb`` where it wrote ``multidb``,
and ``pinning_middleware`` into ``INSTALLED_APPS``::

    DATABASE_ROUTERS = ["pinning_middleware.contrib.multidb.PinningReplicaRouter"]
    MIDDLEWARE = ["pinning_middleware.contrib.multidb.middleware.PinningRouterMiddleware", ...]

With one of the two in the settings ``REPLICA_DATABASES`` and ``MULTIDB_PINNING_…`` are read where
``PINNING_…`` are not set. The cookie keeps its name, so that processes of before and after the
deployment understand each other; the site may go back as it came.
"""

from __future__ import annotations

import warnings
from typing import Any

from django.db import DEFAULT_DB_ALIAS

from pinning_middleware.contrib.multidb.pinning import db_write, this_thread_is_pinned
from pinning_middleware.routers import PinningRouter
from pinning_middleware.routing.pools import pools

__all__ = [
    "DEFAULT_DB_ALIAS",
    "MasterSlaveRouter",
    "PinningMasterSlaveRouter",
    "PinningReplicaRouter",
    "ReplicaRouter",
    "db_write",
    "get_replica",
    "get_slave",
    "this_thread_is_pinned",
]


def get_replica() -> str:
    """Return the replica of ``default`` whose turn it is; ``default`` where none is usable."""
    pool = pools().default
    return (pool and pool.turn()) or DEFAULT_DB_ALIAS


class ReplicaRouter(PinningRouter):
    """
    ``PinningRouter``, with that package's word on relations and migrations. It keeps what a scope
    has written on the primary, which there only ``PinningReplicaRouter`` did.
    """

    def allow_relation(self, obj1: Any, obj2: Any, **hints: Any) -> bool | None:
        """Allow every relation, as it was."""
        return True

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        """Return whether this is a primary, as it was."""
        return db == DEFAULT_DB_ALIAS or db in pools().by_primary

    def allow_syncdb(self, db: str, model: Any) -> bool | None:
        """Return what ``allow_migrate`` does; nobody asks any more."""
        return self.allow_migrate(db, "")


class PinningReplicaRouter(ReplicaRouter):
    """The same, by the name of the one that asked for the pin."""


# What it had deprecated itself


def _deprecated(says: str) -> None:
    warnings.warn(says, DeprecationWarning, stacklevel=3)


def get_slave() -> str:
    _deprecated("get_slave() is get_replica() now.")
    return get_replica()


class MasterSlaveRouter(ReplicaRouter):
    def __init__(self) -> None:
        _deprecated("MasterSlaveRouter is ReplicaRouter now.")
        super().__init__()


class PinningMasterSlaveRouter(PinningReplicaRouter):
    def __init__(self) -> None:
        _deprecated("PinningMasterSlaveRouter is PinningReplicaRouter now.")
        super().__init__()
