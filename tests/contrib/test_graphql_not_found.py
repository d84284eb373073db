"""A GraphQL view that answers ``null`` is run again on the primary, as the page describes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from urllib.parse import urlencode

import graphene
import pytest
import strawberry
from django.test import override_settings
from django.urls import path
from strawberry.django.views import AsyncGraphQLView
from strawberry.django.views import GraphQLView as StrawberryView

from pinning_middleware import pinning_scope, retry_404
from pinning_middleware.stats import get_stats
from tests.app.models import Book
from tests.conftest import Browser

from .pages import load

pytestmark = pytest.mark.django_db(databases=["default", "replica1", "replica2"], transaction=True)


def find(title: str) -> str | None:
    return Book.objects.filter(title=title).values_list("title", flat=True).first()


class Query(graphene.ObjectType):
    book = graphene.String(title=graphene.String())

    def resolve_book(self, info: Any, title: str) -> str | None:
        return find(title)


@strawberry.type
class StrawberryQuery:
    @strawberry.field
    def book(self, title: str) -> str | None:
        return find(title)


@strawberry.type
class AsyncQuery:
    @strawberry.field
    async def book(self, title: str) -> str | None:
        return await Book.objects.filter(title=title).values_list("title", flat=True).afirst()


class Site:
    """The URLs of a site with the view of the page, and the same for strawberry."""

    def __init__(self) -> None:
        page = load("how-to/graphql.md", "Missing objects")["shop/views"]
        again = retry_404(is_miss=page.has_null)
        by_strawberry = StrawberryView.as_view(schema=strawberry.Schema(StrawberryQuery))
        by_async = AsyncGraphQLView.as_view(schema=strawberry.Schema(AsyncQuery))
        self.urlpatterns = [
            path("graphene", page.graphql),
            path("strawberry", again(by_strawberry)),
            path("async", again(by_async)),
            path("unmarked", by_strawberry),
        ]


@pytest.fixture(autouse=True)
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("shop", "shop.schema"):
        module = ModuleType(name)
        module.schema = graphene.Schema(query=Query)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    with override_settings(ROOT_URLCONF=Site()):
        yield


@pytest.mark.parametrize(
    ("address", "found"),
    [("graphene", "new"), ("strawberry", "new"), ("async", "new"), ("unmarked", None)],
)
def test_query_finds_on_the_primary_what_another_client_wrote(
    new_browser: Callable[..., Browser], address: str, found: str | None
) -> None:
    with pinning_scope(isolated=True):
        Book.objects.create(title="new")
    before = get_stats()["retry_404"]["found"]
    query = urlencode({"query": '{book(title: "new")}'})
    response = new_browser().get(f"/{address}?{query}", headers={"accept": "application/json"})
    assert response.json()["data"] == {"book": found}
    assert get_stats()["retry_404"]["found"] - before == (found is not None)
