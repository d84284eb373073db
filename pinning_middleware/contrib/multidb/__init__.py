"""
The names of django-multidb-router 0.11, for sites that migrate to this package.

Replace ``multidb`` by ``pinning_middleware.contrib.multidb`` in the settings, and add
``pinning_middleware`` to ``INSTALLED_APPS``::

    DATABASE_ROUTERS = ["pinning_middleware.contrib.multidb.PinningReplicaRouter"]
    MIDDLEWARE = ["pinning_middleware.contrib.multidb.middleware.PinningRouterMiddleware", ...]

If one of the two is in the settings, ``REPLICA_DATABASES`` and ``MULTIDB_PINNING_…`` are used for
each ``PINNING_…`` that is not set. The cookie keeps its name, so old and new processes can run at
the same time, and the migration can be undone.
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
    """Return the next replica of ``default``, or ``default`` if none is usable."""
    pool = pools().default
    if pool is None or not pool.has_replicas or pool.is_dry_run:
        return DEFAULT_DB_ALIAS
    return pool.replica_set.next() or DEFAULT_DB_ALIAS


class ReplicaRouter(PinningRouter):
    """
    ``PinningRouter`` with the rules of django-multidb-router for relations and migrations.

    Unlike there, a scope that has written also reads from the primary with this class, not only
    with ``PinningReplicaRouter``.
    """

    def allow_relation(self, obj1: Any, obj2: Any, **hints: Any) -> bool | None:
        """Allow every relation."""
        return True

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        """Return whether ``db`` is a primary."""
        return db == DEFAULT_DB_ALIAS or db in pools().by_primary

    def allow_syncdb(self, db: str, model: Any) -> bool | None:
        """Call ``allow_migrate``. Django no longer calls this method."""
        return self.allow_migrate(db, "")


class PinningReplicaRouter(ReplicaRouter):
    """An alias of ``ReplicaRouter``."""


# Names that were already deprecated in django-multidb-router


def _deprecated(message: str) -> None:
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def get_slave() -> str:
    _deprecated("Use get_replica() instead of get_slave().")
    return get_replica()


class MasterSlaveRouter(ReplicaRouter):
    def __init__(self) -> None:
        _deprecated("Use ReplicaRouter instead of MasterSlaveRouter.")
        super().__init__()


class PinningMasterSlaveRouter(PinningReplicaRouter):
    def __init__(self) -> None:
        _deprecated("Use PinningReplicaRouter instead of PinningMasterSlaveRouter.")
        super().__init__()
