"""The code of the recipes in ``docs/how-to``, with the package of each recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import graphene
import pytest
import strawberry
from asgiref.sync import async_to_sync
from django.apps import apps
from django.contrib.auth import get_user_model
from django.contrib.auth.models import AnonymousUser
from django.core.cache import cache
from django.db import connections
from django.http import HttpResponse
from django.test import AsyncClient, Client
from django.urls import include, path
from django.utils.module_loading import import_string
from django.views.decorators.csrf import csrf_exempt
from graphene_django.views import GraphQLView
from rest_framework import serializers
from rest_framework.authentication import BaseAuthentication
from rest_framework.decorators import action
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.response import Response
from rest_framework.routers import SimpleRouter
from rest_framework.views import APIView
from strawberry.django.views import AsyncGraphQLView
from strawberry.django.views import GraphQLView as StrawberryView

from pinning_middleware import pinning_scope
from pinning_middleware.scopes.scope import enter
from pinning_middleware.testing import StaleRead, forbid_stale_reads, replicas
from tests.app.models import Book
from tests.conftest import change_behind, is_replica, where

from .pages import load

pytestmark = [
    pytest.mark.django_db(transaction=True, databases="__all__"),
    pytest.mark.urls(__name__),
]


def given(name: str, **values: Any) -> None:
    """Install a module under the name that the page's code imports from the site."""
    sys.modules[name] = module = ModuleType(name)
    module.__dict__.update(values)


given("shop.models", Book=Book, Price=Book)


# GraphQL by operation: Strawberry


@strawberry.type
class Query:
    @strawberry.field
    def where(self) -> str:
        return where()


@strawberry.type
class AsyncQuery:
    @strawberry.field
    async def where(self) -> str:
        return where()


@strawberry.type
class Mutation:
    @strawberry.mutation
    def add(self, title: str) -> str:
        Book.objects.create(title=title)
        return where()


given("shop.types", Query=Query, Mutation=Mutation)
by_strawberry = load("how-to/graphql.md", "Strawberry")["shop/schema"]
async_strawberries = strawberry.Schema(AsyncQuery, extensions=[by_strawberry.OffloadQueries])


# GraphQL by operation: Graphene


class GrapheneQuery(graphene.ObjectType):
    where = graphene.String()

    def resolve_where(self, info: Any) -> str:
        return where()


class Add(graphene.Mutation):
    class Arguments:
        title = graphene.String()

    where = graphene.String()

    def mutate(self, info: Any, title: str) -> Any:
        Book.objects.create(title=title)
        return Add(where=where())


class GrapheneMutation(graphene.ObjectType):
    add = Add.Field()


graphenes = graphene.Schema(query=GrapheneQuery, mutation=GrapheneMutation)
by_graphene = load("how-to/graphql.md", "Graphene")["shop/settings"].GRAPHENE["MIDDLEWARE"]
one_resolver = load("how-to/graphql.md", "One resolver")["shop/search"]


# Django REST framework by action


class BookSerializer(serializers.ModelSerializer[Book]):
    class Meta:
        model = Book
        fields = ("title",)


given("shop.serializers", BookSerializer=BookSerializer)
by_action: Any = load("how-to/apis.md", "Django REST framework by action")["shop/api"]


class Books(by_action.Books):  # type: ignore[misc]
    """The viewset of the page, whose actions return the alias that they read."""

    authentication_classes = ()
    where = ""

    def get_queryset(self) -> Any:
        self.where = where()
        return super().get_queryset()

    def finalize_response(self, request: Any, response: Any, *args: Any, **kwargs: Any) -> Any:
        response.headers["X-Reads"] = self.where
        if self.action == "search":
            response.data["where"] = self.where
        return super().finalize_response(request, response, *args, **kwargs)

    @action(detail=False, methods=["post"])
    def count(self, request: Any) -> Response:
        return Response({"where": where()})


router = SimpleRouter()
router.register("books", Books)


# Predicates of the request


by_percentage: Any = load("how-to/turn-on-gradually.md", "A percentage of the users")
by_flag: Any = load("how-to/turn-on-gradually.md", "A flag of django-waffle")


def look(request: Any) -> HttpResponse:
    return HttpResponse(where())


def graphql(schema: Any, middleware: Any = None) -> Any:
    return csrf_exempt(GraphQLView.as_view(schema=schema, middleware=middleware))


class Found(graphene.ObjectType):
    title = graphene.String()

    def resolve_title(self, info: Any) -> str | None:
        return Book.objects.values_list("title", flat=True).first()


given("shop.schema", schema=graphene.Schema(query=Found))
retried: Any = load("how-to/graphql.md", "Missing objects")["shop/views"]


class TitleAuthentication(BaseAuthentication):
    """The key is the title of a book."""

    def authenticate(self, request: Any) -> tuple[Any, None]:
        if not Book.objects.filter(title=request.GET["key"]).exists():
            raise AuthenticationFailed
        return AnonymousUser(), None


keys: Any = load("how-to/apis.md", "Keys that were made in the browser")["shop/keys"]


class Lookup(keys.LookAgain, TitleAuthentication):  # type: ignore[misc]
    pass


class Keyed(APIView):
    def get(self, request: Any) -> Response:
        return Response({"where": where()})


urlpatterns = [
    path("found/", retried.graphql),
    path("keyed/", Keyed.as_view(authentication_classes=[Lookup])),
    path("unaware/", Keyed.as_view(authentication_classes=[TitleAuthentication])),
    path("strawberry/", csrf_exempt(StrawberryView.as_view(schema=by_strawberry.schema))),
    path("async/", csrf_exempt(AsyncGraphQLView.as_view(schema=async_strawberries))),
    path("bare/", graphql(graphenes)),
    path("graphene/", graphql(graphenes, [import_string(entry) for entry in by_graphene])),
    path(
        "one/strawberry/",
        csrf_exempt(StrawberryView.as_view(schema=strawberry.Schema(one_resolver.Query))),
    ),
    path("one/graphene/", graphql(graphene.Schema(query=one_resolver.GrapheneQuery))),
    path("", include(router.urls)),
    path("look/", look),
]


def post(client: Client, address: str, **data: Any) -> Any:
    enter(None)
    response = client.post(address, json.dumps(data), content_type="application/json")
    assert response.status_code in (200, 201), response.content
    return response.json()


def ask(client: Client, name: str) -> str:
    data = post(client, f"/{name}/", query="{ where }")["data"]
    return str(data["where"])


def get(client: Client) -> str:
    enter(None)
    return str(client.get("/look/").content.decode())


ADD = {
    "strawberry": 'mutation { add(title: "x") }',
    "graphene": 'mutation { add(title: "x") { where } }',
}


@pytest.mark.parametrize("name", ADD)
def test_graphql_by_operation(name: str) -> None:
    client = Client()
    assert is_replica(ask(client, name))
    assert "default" in str(post(client, f"/{name}/", query=ADD[name])["data"])
    assert ask(client, name) == "default"
    assert is_replica(ask(Client(), name))


def test_graphql_without_the_recipe_reads_the_primary() -> None:
    """The query is sent by POST."""
    assert ask(Client(), "bare") == "default"


def test_graphql_by_operation_async() -> None:
    response = async_to_sync(AsyncClient().post)(
        "/async/", json.dumps({"query": "{ where }"}), content_type="application/json"
    )
    assert is_replica(response.json()["data"]["where"])


@pytest.mark.parametrize("name", ADD)
def test_graphql_by_resolver(name: str) -> None:
    """The book exists only on the primary, and no pin covers it."""
    replicas.catch_up()
    change_behind("default", "INSERT INTO app_book (title, author_id) VALUES ('x', NULL)")
    client = Client()
    found = [post(client, f"/one/{name}/", query='{ found(title: "x") }') for _ in range(2)]
    assert found == [{"data": {"found": 0}}] * 2
    post(client, "/books/", title="y")
    found = [post(client, f"/one/{name}/", query='{ found(title: "x") }')]
    assert found == [{"data": {"found": 1}}]


def test_offload_of_a_viewset_action() -> None:
    client = Client()
    assert is_replica(post(client, "/books/search/", titles=["x"])["where"])
    assert post(client, "/books/count/")["where"] == "default"
    post(client, "/books/", title="x")
    assert post(client, "/books/search/", titles=["x"]) == {"where": "default", "found": 1}
    assert is_replica(post(Client(), "/books/search/", titles=["x"])["where"])


def test_offload_of_an_inherited_viewset_action(settings: Any) -> None:
    settings.PINNING_OFFLOAD = False
    client = Client()
    assert is_replica(client.get("/books/").headers["X-Reads"])
    assert get(client) == "default"
    post(client, "/books/", title="x")
    assert client.get("/books/").json() == [{"title": "x"}]


@pytest.fixture
def users() -> list[Any]:
    return [get_user_model().objects.create(username=f"user{number}") for number in range(60)]


def test_offload_for_a_percentage_of_users(
    settings: Any, users: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.PINNING_OFFLOAD = by_percentage["shop/settings"].PINNING_OFFLOAD
    chosen: list[set[int]] = []
    for percent in (0, 30, 60, 100):
        monkeypatch.setattr(by_percentage["shop/replicas"], "PERCENT", percent)
        chosen.append({user.pk for user in users if is_replica(get(logged_in(user)))})
    none, few, many, everybody = chosen
    assert none == set()
    assert everybody == {user.pk for user in users}
    assert few < many < everybody
    assert 6 <= len(few) <= 30
    assert get(Client()) == "default"


def logged_in(user: Any) -> Client:
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def waffle(settings: Any) -> Iterator[Any]:
    """The app, with the tables that its migrations would have made."""
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "waffle"]
    # Creates the reverse relations from users to flags.
    apps.clear_cache()
    from waffle.models import Flag

    with connections["default"].schema_editor() as editor:
        editor.create_model(Flag)
    yield Flag
    with connections["default"].schema_editor() as editor:
        editor.delete_model(Flag)
    settings.INSTALLED_APPS = settings.INSTALLED_APPS[:-1]
    apps.clear_cache()


def test_offload_by_a_waffle_flag(settings: Any, users: list[Any], waffle: Any) -> None:
    settings.PINNING_OFFLOAD = by_flag["shop/settings"].PINNING_OFFLOAD
    tester, other = map(logged_in, users[:2])
    flag = waffle.objects.create(name="replicas")
    flag.users.add(users[0])
    flag.flush()
    assert is_replica(get(tester))
    assert get(other) == "default"
    flag.everyone = True
    flag.save()
    assert is_replica(get(other))
    post(other, "/books/", title="x")
    assert get(other) == "default"


# Missing rows: GraphQL by GET, and keys that were made in the browser


def test_graphql_query_by_get_is_retried_on_the_primary_if_it_has_null() -> None:
    """The replicas of these tests never have the write."""
    change_behind("default", "INSERT INTO app_book (title, author_id) VALUES ('x', NULL)")
    enter(None)
    found = Client().get("/found/", {"query": "{ title }"})
    assert found.json() == {"data": {"title": "x"}}


def test_key_that_a_replica_does_not_have_is_looked_up_on_the_primary() -> None:
    change_behind("default", "INSERT INTO app_book (title, author_id) VALUES ('key', NULL)")
    client = Client()
    enter(None)
    assert client.get("/unaware/", {"key": "key"}).status_code == 403
    enter(None)
    assert is_replica(client.get("/keyed/", {"key": "key"}).json()["where"])
    enter(None)
    assert client.get("/keyed/", {"key": "other"}).status_code == 403


# Locks in a cache


def test_work_inside_a_lock_of_the_cache_reads_the_primary() -> None:
    rename = load("how-to/sessions-and-caches.md", "Locks")["shop/locks"].rename
    change_behind("default", "INSERT INTO app_book (title, author_id) VALUES ('x', NULL)")
    number = Book.objects.using("default").get().pk
    with pinning_scope(isolated=True):
        assert rename(number, "y")
    assert Book.objects.using("default").get().title == "y"
    cache.add(f"rename:{number}", True)
    assert not rename(number, "z")


# What is cached for all users

cached: Any = load("how-to/sessions-and-caches.md", "What is cached for all users")["shop/prices"]


def read_anywhere() -> list[str]:
    return list(Book.objects.values_list("title", flat=True))


@pytest.mark.parametrize(
    ("fill", "prices"), [(read_anywhere, []), (cached.read_prices, ["new"])], ids=["naive", "page"]
)
def test_stranger_refills_a_shared_cache_from_the_primary_by_the_recipe(
    monkeypatch: pytest.MonkeyPatch, fill: Any, prices: list[str]
) -> None:
    """The replicas of these tests never have the write."""
    monkeypatch.setattr(cached, "read_prices", fill)
    with pinning_scope(isolated=True):
        assert cached.prices() == []
    with pinning_scope(isolated=True) as writer:
        Book.objects.create(title="new")
        cache.delete("prices")
    with pinning_scope(isolated=True):
        cached.prices()
    with pinning_scope(writer.token, isolated=True):
        assert cached.prices() == prices


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (read_anywhere, pytest.raises(StaleRead, match="app_book")),
        (cached.read_prices, nullcontext()),
    ],
    ids=["naive", "page"],
)
def test_test_kit_finds_a_shared_cache_that_a_lagging_replica_fills(
    fill: Any, expected: Any
) -> None:
    with expected, replicas.lag(), forbid_stale_reads():
        with pinning_scope(isolated=True):
            Book.objects.create(title="new")
        with pinning_scope(isolated=True):
            assert cache.get_or_set("prices", fill) == ["new"]
