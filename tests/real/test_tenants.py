"""django-tenants sets a schema on one connection; the recipe in docs sets it on all of a pool."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connections, transaction
from django.test import override_settings

from pinning_middleware import use_primary
from pinning_middleware.testing import capture_reads
from sample_site.cluster import Cluster
from tests.app.models import Book
from tests.contrib.pages import load

from .conftest import PostgreSQL, django_on, unrelated_scope
from .layouts import missing

pytestmark = pytest.mark.real

TENANTS = ("north", "south")


@pytest.fixture
def tenants(
    cluster: Cluster, django_db_setup: None, django_db_blocker: Any
) -> Iterator[PostgreSQL]:
    """Two tenants beside `public`, each with a table of books that has one of its own."""
    if importlib.util.find_spec("django_tenants") is None:
        missing("django-tenants is missing: pip install django-tenants")
    engine = "django_tenants.postgresql_backend"
    with django_db_blocker.unblock(), django_on(cluster, ENGINE=engine) as servers:
        for name in TENANTS:
            servers["pg"].execute(f"CREATE SCHEMA {name}", database="site")
            table = f"CREATE TABLE {name}.app_book (LIKE public.app_book INCLUDING ALL)"
            servers["pg"].execute(table, database="site")
        for name in ("public", *TENANTS):
            insert = f"INSERT INTO {name}.app_book (id, title) VALUES (0, '{name}')"
            servers["pg"].execute(insert, database="site")
        servers.wait_for()
        try:
            yield servers
        finally:
            for node in servers.cluster.nodes.values():
                node.thaw()
            servers.repair()
            for name in TENANTS:
                drop = f"DROP SCHEMA {name} CASCADE"
                servers["pg"].execute(drop, database="site")


@pytest.fixture
def recipe(tenants: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recipe's settings."""
    from django_tenants.postgresql_backend import base

    shop = load("how-to/tenants.md", "Tenants of django-tenants")
    functions: Any = shop["shop/tenants"]
    functions.REPLICAS = ["pg1", "pg2"]
    # It is imported when the ENGINE is.
    monkeypatch.setattr(base, "EXTRA_SET_TENANT_METHOD", functions.set_on_replicas)
    with override_settings(PINNING_SESSION_SETUP=shop["shop/settings"].PINNING_SESSION_SETUP):
        yield


def titles() -> list[str]:
    return list(Book.objects.values_list("title", flat=True))


def set_tenant(name: str) -> None:
    connections["pg"].set_schema(name)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("recipe")
def test_replica_reads_the_schema_of_the_tenant() -> None:
    with unrelated_scope(), capture_reads() as reads:
        # The first read, of the tenant itself, is one of `public`.
        for name in ("public", "north", "south", "north"):
            set_tenant(name)
            assert titles() == [name]
    assert [(read.role, read.reason) for read in reads] == [("replica", "round_robin")] * 4


@pytest.mark.usefixtures("recipe")
def test_scope_that_read_the_primary_reads_the_schema_of_the_tenant_from_a_replica() -> None:
    with unrelated_scope(), capture_reads() as reads:
        set_tenant("north")
        with use_primary():
            assert titles() == ["north"]
        assert titles() == ["north"]
    assert [read.role for read in reads] == ["primary", "replica"]


@pytest.mark.usefixtures("recipe")
@pytest.mark.parametrize("fault", ["stop", "freeze", "terminate"])
def test_read_that_fails_over_reads_the_schema_of_the_tenant(
    tenants: PostgreSQL, fault: str
) -> None:
    with unrelated_scope():
        set_tenant("north")
        with capture_reads() as reads:
            assert titles() == ["north"]
        [read] = reads
        if fault == "terminate":
            tenants.terminate(read.served)
        else:
            getattr(tenants[read.served], fault)()
        with capture_reads() as reads:
            assert titles() == ["north"]
    assert [each.role for each in reads] == ["replica"]


@pytest.mark.usefixtures("recipe")
def test_rolled_back_transaction_leaves_the_schema_of_the_tenant() -> None:
    with unrelated_scope():
        set_tenant("south")
        assert titles() == ["south"]
        set_tenant("north")
        with transaction.atomic(using="pg"):
            assert titles() == ["north"]
            transaction.set_rollback(True, using="pg")
        assert titles() == ["north"]
