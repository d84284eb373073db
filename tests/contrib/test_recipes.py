"""The recipes of the documentation, each with the package that it is for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

import graphene
import pytest
import strawberry
from asgiref.sync import async_to_sync
from django.apps import apps
from django.contrib.auth import get_user_model
from django.db import connections
from django.test import AsyncClient, Client
from django.urls import include, path
from django.views.decorators.csrf import csrf_exempt
from graphene_django.views import GraphQLView
from graphql import OperationType
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.response import Response
from rest_framework.routers import SimpleRouter
from rest_framework.viewsets import ModelViewSet
from strawberry.django.views import AsyncGraphQLView
from strawberry.django.views import GraphQLView as StrawberryView
from strawberry.extensions import SchemaExtension
from strawberry.types.graphql import OperationType as Operation

from pinning_middleware import offload, offload_this_request
from pinning_middleware.scopes.scope import enter
from tests.app.models import Book
from tests.conftest import is_replica, where

pytestmark = [
    pytest.mark.django_db(transaction=True, databases="__all__"),
    pytest.mark.urls(__name__),
]


# GraphQL by operation: Strawberry


class OffloadQueries(SchemaExtension):
    """Queries come by POST; they read from replicas all the same. Mutations do as ever."""

    def on_execute(self) -> Iterator[None]:
        if self.execution_context.operation_type is Operation.QUERY:
            offload_this_request()
        yield


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


strawberries = strawberry.Schema(Query, Mutation, extensions=[OffloadQueries])
async_strawberries = strawberry.Schema(AsyncQuery, extensions=[OffloadQueries])


# GraphQL by operation: Graphene


class OffloadGrapheneQueries:
    """An entry of GRAPHENE["MIDDLEWARE"]."""

    def resolve(self, following: Any, root: Any, info: Any, **arguments: Any) -> Any:
        if root is None and info.operation.operation is OperationType.QUERY:
            offload_this_request()
        return following(root, info, **arguments)


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


# Django REST framework by action


class BookSerializer(serializers.ModelSerializer[Book]):
    class Meta:
        model = Book
        fields = ("title",)


class Books(ModelViewSet[Book]):
    queryset = Book.objects.all()
    serializer_class = BookSerializer
    authentication_classes = ()

    @action(detail=False, methods=["post"])
    @offload
    def search(self, request: Any) -> Response:
        """Its filters are too long for an address."""
        found = self.get_queryset().filter(title__in=request.data["titles"])
        return Response({"where": found.db, "found": len(found)})

    @action(detail=False, methods=["post"])
    def count(self, request: Any) -> Response:
        return Response({"where": where()})


router = SimpleRouter()
router.register("books", Books)


# A percentage


PERCENT = 30


def some_users(request: Any) -> bool:
    """PINNING_OFFLOAD: the same users, as the percentage grows, and nobody who is not logged in."""
    if not request.user.is_authenticated:
        return False
    return zlib.crc32(f"replicas:{request.user.pk}".encode()) % 100 < PERCENT


# A flag of django-waffle


def flagged(request: Any) -> bool:
    """PINNING_OFFLOAD: whom the flag is on for."""
    from waffle import flag_is_active

    return bool(flag_is_active(request, "replicas"))


def look(request: Any) -> Any:
    from django.http import HttpResponse

    return HttpResponse(where())


urlpatterns = [
    path("strawberry/", csrf_exempt(StrawberryView.as_view(schema=strawberries))),
    path("async/", csrf_exempt(AsyncGraphQLView.as_view(schema=async_strawberries))),
    path("bare/", csrf_exempt(GraphQLView.as_view(schema=graphenes))),
    path(
        "graphene/",
        csrf_exempt(GraphQLView.as_view(schema=graphenes, middleware=[OffloadGrapheneQueries()])),
    ),
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


def test_without_the_recipe_a_query_reads_from_the_primary() -> None:
    """It comes by POST."""
    assert ask(Client(), "bare") == "default"


def test_graphql_by_operation_in_async_code() -> None:
    response = async_to_sync(AsyncClient().post)(
        "/async/", json.dumps({"query": "{ where }"}), content_type="application/json"
    )
    assert is_replica(response.json()["data"]["where"])


def test_an_action_of_a_viewset() -> None:
    client = Client()
    assert is_replica(post(client, "/books/search/", titles=["x"])["where"])
    assert post(client, "/books/count/")["where"] == "default"
    post(client, "/books/", title="x")
    assert post(client, "/books/search/", titles=["x"]) == {"where": "default", "found": 1}
    assert is_replica(post(Client(), "/books/search/", titles=["x"])["where"])


@pytest.fixture
def users() -> list[Any]:
    return [get_user_model().objects.create(username=f"user{number}") for number in range(60)]


def test_a_percentage_of_users(
    settings: Any, users: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.PINNING_OFFLOAD = f"{__name__}.some_users"
    chosen: list[set[int]] = []
    for percent in (0, 30, 60, 100):
        monkeypatch.setitem(globals(), "PERCENT", percent)
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
    # Users are to know that flags refer to them.
    apps.clear_cache()
    from waffle.models import Flag

    with connections["default"].schema_editor() as editor:
        editor.create_model(Flag)
    yield Flag
    with connections["default"].schema_editor() as editor:
        editor.delete_model(Flag)
    settings.INSTALLED_APPS = settings.INSTALLED_APPS[:-1]
    apps.clear_cache()


def test_a_flag_of_waffle(settings: Any, users: list[Any], waffle: Any) -> None:
    settings.PINNING_OFFLOAD = f"{__name__}.flagged"
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
