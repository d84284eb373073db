"""
What a database reports about a server: its identity, its role and its replication position.

One file for each database. To add one, subclass ``Dialect``, and add its dotted path to
``DIALECTS`` under the backend's ``connection.vendor``, in an app's ``ready()``. Add its lexers to
``sql.lexers.LEXERS`` too: without them everything but a plain SELECT counts as a write. What a
dialect does not cover is optional, and known for single vendors only: the check of a slow session
(PostgreSQL), and details of ``pinning_status`` and ``pinning_check``.
"""

from __future__ import annotations

from functools import lru_cache

from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.module_loading import import_string

from pinning_middleware.servers.dialects.base import (
    Dialect,
    Driver,
    Identification,
    PositionUnavailable,
    Query,
    Refusal,
    Row,
)

__all__ = [
    "DIALECTS",
    "Dialect",
    "Driver",
    "Identification",
    "PositionUnavailable",
    "Query",
    "Refusal",
    "Row",
    "dialect_for",
]

# By vendor. SQLite and Oracle have no position that a session may read.
DIALECTS = {
    "postgresql": "pinning_middleware.servers.dialects.postgresql.PostgreSQL",
    "mysql": "pinning_middleware.servers.dialects.mysql.MySQL",
}


def dialect_for(connection: BaseDatabaseWrapper) -> Dialect | None:
    """Return the dialect of a connection's database, or None if it has none. Does no I/O."""
    path = DIALECTS.get(connection.vendor)
    return None if path is None else _load_dialect(path)


@lru_cache
def _load_dialect(path: str) -> Dialect:
    dialect: Dialect = import_string(path)()
    return dialect
