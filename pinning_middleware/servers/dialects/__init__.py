"""
What a database can tell of its own log: which server answers, how far it is.

One file for each dialect of databases. To add one, derive from ``Dialect``, and name its dotted
path in ``DIALECTS`` under the backend's ``connection.vendor``, in an app's ``ready()``.
"""

from __future__ import annotations

from functools import lru_cache

from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.module_loading import import_string

from pinning_middleware.servers.dialects.base import (
    Dialect,
    Identification,
    PositionUnavailable,
    Query,
    Row,
)

__all__ = [
    "DIALECTS",
    "Dialect",
    "Identification",
    "PositionUnavailable",
    "Query",
    "Row",
    "dialect_for",
]

# Vendors that are not here (SQLite, Oracle) have no position that a session may read.
DIALECTS = {
    "postgresql": "pinning_middleware.servers.dialects.postgresql.PostgreSQL",
    "mysql": "pinning_middleware.servers.dialects.mysql.MySQL",
}


def dialect_for(connection: BaseDatabaseWrapper) -> Dialect | None:
    """
    Return who reads the positions of this connection's database, ``None`` where nobody can. It
    asks the database nothing: there may not be a connection yet.
    """
    path = DIALECTS.get(connection.vendor)
    return None if path is None else _load_dialect(path)


@lru_cache
def _load_dialect(path: str) -> Dialect:
    dialect: Dialect = import_string(path)()
    return dialect
