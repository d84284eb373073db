"""
What a database can tell of its own log: which server answers, how far it is.

One file for each family of databases. To add one, derive from ``Family``, and name its dotted
path in ``FAMILIES`` under the backend's ``connection.vendor``, in an app's ``ready()``.
"""

from __future__ import annotations

from functools import lru_cache

from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.module_loading import import_string

from .base import Ask, CannotTell, Family, Row, Who

__all__ = ["FAMILIES", "Ask", "CannotTell", "Family", "Row", "Who", "family_of"]

# Vendors that are not here (SQLite, Oracle) have no position that a session may read.
FAMILIES = {
    "postgresql": "pinning_middleware.servers.positions.postgresql.PostgreSQL",
    "mysql": "pinning_middleware.servers.positions.mysql.Either",
}


def family_of(connection: BaseDatabaseWrapper) -> Family | None:
    """
    Return who reads the positions of this connection's database, ``None`` where nobody can. It
    asks the database nothing: there may not be a connection yet.
    """
    path = FAMILIES.get(connection.vendor)
    return None if path is None else _family(path)


@lru_cache
def _family(path: str) -> Family:
    family: Family = import_string(path)()
    return family
