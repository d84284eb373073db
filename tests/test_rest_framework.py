"""Users that Django REST framework authenticates inside the view."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.cache import caches
from django.test import Client, override_settings
from django.urls import path
from rest_framework.authentication import BaseAuthentication
from rest_framework.response import Response
from rest_framework.views import APIView

from pinning_middleware.contrib.rest_framework import pinned
from pinning_middleware.scopes.scope import enter, entered_scope
from tests.app.models import Book
from tests.caches import calls
from tests.conftest import is_replica, where
from tests.valkey import pins_in

pytestmark = [
    pytest.mark.django_db(transaction=True, databases="__all__"),
    pytest.mark.urls(__name__),
]


class ByName(BaseAuthentication):
    """A minimal authentication class without queries."""

    def authenticate(self, request: Any) -> Any:
        name = request.headers.get("X-User")
        return None if name is None else (User(pk=int(name), username=name), None)


class View(APIView):
    authentication_classes = (ByName,)

    def get(self, request: Any) -> Response:
        return Response(where())

    def post(self, request: Any) -> Response:
        Book.objects.create(title="x")
        return Response(where())


class PinnedView(View):
    authentication_classes = (pinned(ByName),)


urlpatterns = [path("plain/", View.as_view()), path("pinned/", PinnedView.as_view())]


@pytest.fixture(autouse=True)
def cached() -> Any:
    counting = {"BACKEND": "tests.caches.CountingCache", "LOCATION": "pins"}
    with pins_in(counting, PINNING_STORES=["pinning_middleware.stores.CacheStore"]):
        caches["pins"].clear()
        yield


def ask(name: str, user: str | None, method: str = "get") -> str:
    headers = {} if user is None else {"X-User": user}
    enter(None)
    return str(getattr(Client(), method)(f"/{name}/", headers=headers).json())


def test_pins_of_the_user_authenticated_in_the_view_apply() -> None:
    ask("pinned", "7", "post")
    assert ask("pinned", "7") == "default"
    assert is_replica(ask("pinned", "8"))
    assert is_replica(ask("pinned", None))


def test_pins_without_pinned_authentication_are_saved_and_not_loaded() -> None:
    ask("plain", "7", "post")
    assert is_replica(ask("plain", "7"))
    assert ask("pinned", "7") == "default"


def test_disabled_setting_is_respected() -> None:
    ask("pinned", "7", "post")
    with override_settings(PINNING_ENABLED=False):
        calls.clear()
        assert ask("pinned", "7") == "default"
        assert not calls
        scope = entered_scope()
        assert scope is None or not scope.inherited_pins


def test_decorated_class_keeps_its_name() -> None:
    assert pinned(ByName).__name__ == "ByName"
    assert issubclass(pinned(ByName), ByName)
