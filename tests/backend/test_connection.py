"""The mixin of connection classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.signals import connection_created

from pinning_middleware import pinning_scope
from pinning_middleware.backend.connection import InstrumentedConnection


def test_copied_connection_has_the_mixin_once_it_is_open() -> None:
    copied = connections["default"].copy()
    connection_created.send(type(copied), connection=copied)
    assert isinstance(copied, InstrumentedConnection)


@pytest.mark.parametrize("alias", ["default", "replica1"])
def test_connection_of_another_kind_is_refused_in_a_pool(alias: str) -> None:
    """As that of a package with asynchronous connections, whose writes are not seen."""
    connection = SimpleNamespace(alias=alias)
    with pytest.raises(ImproperlyConfigured, match="BaseDatabaseWrapper"):
        connection_created.send(SimpleNamespace, connection=connection)


def test_connection_of_another_kind_is_ignored_outside_pools() -> None:
    connection_created.send(SimpleNamespace, connection=SimpleNamespace(alias="unheard-of"))


@pytest.mark.django_db(transaction=True, databases="__all__")
@pytest.mark.parametrize("alias", ["default", "replica1"])
@pytest.mark.parametrize("method", ["execute", "executescript"])
def test_statement_of_a_connection_created_receiver_is_no_write(alias: str, method: str) -> None:
    def set_up(connection: Any, **kwargs: Any) -> None:
        with connection.cursor() as cursor:
            getattr(cursor, method)("PRAGMA optimize")

    connection = connections.create_connection(alias)
    connection_created.connect(set_up)
    try:
        with pinning_scope(isolated=True) as scope:
            connection.connect()
        assert scope.token is None
    finally:
        connection_created.disconnect(set_up)
        connection.close()
