"""Subqueries with an alias of their own: the aliases of a pool are one database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db.models import QuerySet
from django.test import override_settings

from pinning_middleware import pinning_scope, use_primary
from pinning_middleware.testing import assert_reads_from
from tests.app.models import Account, Author, Book
from tests.conftest import ROUTER, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

TWO_POOLS = override_settings(
    PINNING_REPLICAS={"default": ["replica1", "replica2"], "users": ["users_replica"]},
    DATABASE_ROUTERS=[ROUTER, "tests.app.routers.UsersRouter"],
)
ACROSS = "across different databases"


@pytest.fixture(autouse=True)
def rows(named: Callable[..., None]) -> Iterator[None]:
    """Give each database other values, so that a value tells where it was read."""
    named()
    with pinning_scope(isolated=True):
        yield


def titles(queryset: Any) -> list[str]:
    return [book.title for book in queryset]


@pytest.mark.parametrize("alias", ["default", "replica1", "replica2"])
def test_subquery_of_another_alias_of_the_pool_runs_on_the_replica(alias: str) -> None:
    assert is_replica(where())
    authors = Author.objects.using(alias)
    (title,) = titles(Book.objects.filter(author__in=authors))
    assert is_replica(title)
    (title,) = titles(Book.objects.filter(pk__in=Book.objects.using(alias).values("pk")))
    assert is_replica(title)
    assert titles(Book.objects.exclude(pk__in=Book.objects.using(alias))) == []


def test_subquery_of_a_replica_runs_on_the_primary() -> None:
    books = Book.objects.filter(author__in=Author.objects.using("replica1"))
    with use_primary(), assert_reads_from("default"):
        assert titles(books) == ["default"]


def test_subquery_keeps_its_own_alias() -> None:
    """A queryset that was used as a subquery may be evaluated later."""
    authors: QuerySet[Author] = Author.objects.using("default")
    titles(Book.objects.filter(author__in=authors))
    assert authors.db == "default"
    assert [author.name for author in authors] == ["default"]


@TWO_POOLS
def test_subquery_of_another_pool_raises_value_error() -> None:
    for accounts in (Account.objects.using("users"), Account.objects.using("users_replica")):
        with pytest.raises(ValueError, match=ACROSS):
            titles(Book.objects.filter(pk__in=accounts.values("pk")))
    with pytest.raises(ValueError, match=ACROSS):
        list(Account.objects.filter(pk__in=Book.objects.using("default").values("pk")))


def test_subquery_of_an_alias_outside_the_pools_raises_value_error() -> None:
    with pytest.raises(ValueError, match=ACROSS):
        titles(Book.objects.filter(pk__in=Book.objects.using("elsewhere").values("pk")))
    with pytest.raises(ValueError, match=ACROSS):
        titles(
            Book.objects.using("elsewhere").filter(
                pk__in=Book.objects.using("default").values("pk")
            )
        )
