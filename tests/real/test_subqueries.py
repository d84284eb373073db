"""Subqueries between the aliases of a pool, on servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db.models import Exists, OuterRef, Q, QuerySet, Subquery

from pinning_middleware import use_primary
from tests.app.models import Author, Book, Tag
from tests.conftest import Visit

from .conftest import PostgreSQL, unrelated_scope

pytestmark = pytest.mark.real

ALIASES = [None, "pg", "pg1", "pg2"]


def of(model: Any, alias: str | None) -> QuerySet[Any]:
    rows: QuerySet[Any] = model.objects.all()
    return rows if alias is None else rows.using(alias)


# Each takes the outer queryset of books, the inner one of books and the inner one of authors.
FILTERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "filter": lambda outer, books, authors: outer.filter(pk__in=books),
    "values": lambda outer, books, authors: outer.filter(pk__in=books.values("pk")),
    "sliced": lambda outer, books, authors: outer.filter(pk__in=books.order_by("pk")[:5]),
    "exclude": lambda outer, books, authors: outer.exclude(pk__in=books.filter(title="none")),
    "Q": lambda outer, books, authors: outer.filter(Q(pk__in=books) | Q(author__in=authors)),
    "relation": lambda outer, books, authors: outer.filter(author__in=authors),
    "nested": lambda outer, books, authors: outer.filter(
        pk__in=books.filter(author__in=authors.filter(pk__in=authors))
    ),
    "union": lambda outer, books, authors: outer.filter(
        pk__in=books.values("pk").union(books.values("pk"))
    ),
    "exact": lambda outer, books, authors: outer.filter(author=authors[:1]),
    "Exists": lambda outer, books, authors: outer.filter(
        Exists(authors.filter(pk=OuterRef("author")))
    ),
    "Subquery": lambda outer, books, authors: outer.filter(
        title__in=Subquery(books.values("title"))
    ),
}


@pytest.fixture(autouse=True)
def rows(pg: PostgreSQL) -> None:
    with unrelated_scope():
        Book.objects.create(title="one", author=Author.objects.create(name="she"))
    pg.wait_for()


def found(queryset: Any) -> list[str]:
    return [book.title for book in queryset]


@pytest.mark.parametrize("form", FILTERS)
@pytest.mark.parametrize("outer", ALIASES)
def test_subquery_of_any_alias_of_the_pool_runs_on_any_other(
    pg: PostgreSQL, outer: str | None, form: str
) -> None:
    for inner in ALIASES:
        with unrelated_scope():
            books = FILTERS[form](of(Book, outer), of(Book, inner), of(Author, inner))
            assert found(books) == ["one"]
            assert books.count() == 1


@pytest.mark.parametrize("form", FILTERS)
def test_subquery_of_any_alias_of_the_pool_runs_in_a_pinned_scope(
    pg: PostgreSQL, form: str
) -> None:
    """The read moves to the primary after Django has compiled it for a replica."""
    pg.pause()
    with unrelated_scope() as scope:
        Book.objects.create(title="two", author=Author.objects.create(name="he"))
    for outer in ALIASES:
        for inner in ALIASES:
            with unrelated_scope(scope.token):
                books = FILTERS[form](of(Book, outer), of(Book, inner), of(Author, inner))
                expected = ["one", "two"] if form != "exact" else ["one"]
                assert sorted(found(books)) == expected


@pytest.mark.parametrize("inner", ALIASES)
def test_subquery_of_any_alias_of_the_pool_runs_in_update_and_delete(
    pg: PostgreSQL, inner: str | None
) -> None:
    with unrelated_scope():
        assert Book.objects.filter(pk__in=of(Book, inner)).update(title="changed") == 1
        assert found(Book.objects.filter(author__in=of(Author, inner))) == ["changed"]
        Tag.objects.create(name="one")
        assert Tag.objects.filter(pk__in=of(Tag, inner)).delete()[0] == 1


def test_subquery_of_the_primary_runs_on_a_replica_in_a_view(pg: PostgreSQL, visit: Visit) -> None:
    def act(request: Any) -> list[str]:
        return found(Book.objects.filter(pk__in=Book.objects.using("pg")))

    assert visit(act) == ["one"]
    assert visit(use_primary(act)) == ["one"]


def test_subquery_of_the_primary_runs_on_a_replica_in_an_async_iteration(
    pg: PostgreSQL, browser: Any, do: Callable[..., str]
) -> None:
    results = []

    async def act(request: Any) -> None:
        async for book in Book.objects.filter(author__in=Author.objects.using("pg")):
            results.append(book.title)  # noqa: PERF401

    browser.get(f"/async/{do(act)}/")
    assert results == ["one"]
