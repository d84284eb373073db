"""The check in the real django-health-check: by itself, and in its view."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings as site
from django.db import connections
from django.test import AsyncClient, Client, override_settings
from django.urls import path
from health_check.exceptions import ServiceUnavailable, ServiceWarning
from health_check.views import HealthCheckView

from pinning_middleware.contrib.health_check import Replicas
from pinning_middleware.scopes.scope import enter, entered_scope
from pinning_middleware.servers.registry import registry
from pinning_middleware.utils import counters

from .pages import load

pytestmark = [
    pytest.mark.django_db(transaction=True, databases="__all__"),
    pytest.mark.urls(__name__),
]

# The page's own addresses.
PAGE = load("integrations.md", "django-health-check")["shop/urls"]
NAME = PAGE.REPLICAS

urlpatterns = [
    *PAGE.urlpatterns,
    path("one/", HealthCheckView.as_view(checks=[NAME])),
    path("two/", HealthCheckView.as_view(checks=[(NAME, {"min_replicas": 2})])),
    path("users/", HealthCheckView.as_view(checks=[(NAME, {"pool": "users"})])),
]


@pytest.fixture(autouse=True)
def nobody_out() -> Iterator[None]:
    registry.clear()
    with override_settings(PINNING_REPLICAS=["replica1", "replica2"]):
        yield
    registry.clear()


@pytest.fixture
def break_down(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that lets replicas be where nobody can connect to them."""

    def move(*aliases: str) -> None:
        for alias in aliases:
            monkeypatch.setitem(connections.settings[alias], "NAME", "/nowhere/at/all.sqlite3")

    return move


def result(**options: Any) -> Any:
    """What the package makes of the check: its error, ``None`` for none."""
    return asyncio.run(Replicas(**options).get_result()).error


def test_enough() -> None:
    assert result() is None
    assert result(min_replicas=2) is None


def test_fewer_than_are_wanted(break_down: Any) -> None:
    break_down("replica2")
    assert result() is None
    error = result(min_replicas=2)
    assert type(error) is ServiceWarning
    assert error.message == "1 of 2 replicas of 'default' in the rotation (replica2: connect)"


def test_none(break_down: Any) -> None:
    break_down("replica1", "replica2")
    error = result()
    assert type(error) is ServiceUnavailable
    assert error.message == (
        "0 of 2 replicas of 'default' in the rotation (replica1: connect, replica2: connect)"
    )
    # Whoever wants none still wants to hear that there is none.
    assert type(result(min_replicas=0)) is ServiceUnavailable


def test_one_that_is_out() -> None:
    registry.mark_down(registry.endpoint("replica1", "default"), "promoted", 1000, "promoted")
    error = result(min_replicas=2)
    assert type(error) is ServiceWarning
    assert "replica1: role" in error.message


def test_a_drained_one_does_not_count() -> None:
    with override_settings(PINNING_REPLICAS={"default": {"replica1": 1, "replica2": 0}}):
        assert result() is None
        assert result(min_replicas=2).message == "1 of 1 replicas of 'default' in the rotation"


def test_lag_that_cannot_be_told() -> None:
    """SQLite tells no positions."""
    error = result(max_lag=10)
    assert type(error) is ServiceUnavailable
    assert "replica1: lag unknown" in error.message


def test_a_pool_that_is_not_there() -> None:
    error = result(pool="nothing")
    assert type(error) is ServiceUnavailable
    assert error.message == "'nothing' is no primary of PINNING_REPLICAS"


@pytest.mark.parametrize(
    "settings", [{"PINNING_ENABLED": False}, {"PINNING_REPLICAS": {"default": {"replica1": 0}}}]
)
def test_the_settings_use_no_replica(settings: dict[str, Any]) -> None:
    with override_settings(**settings):
        error = result()
    assert type(error) is ServiceWarning
    assert "by the settings" in error.message


def test_it_is_no_read_of_the_site() -> None:
    before = dict(counters.reads)
    enter(None)
    assert result() is None
    assert counters.reads == before
    assert entered_scope() is None


@pytest.mark.parametrize("kind", ["wsgi", "asgi"])
def test_the_view(kind: str, break_down: Any) -> None:
    async def aget(address: str) -> Any:
        return await AsyncClient().get(address, headers={"accept": "application/json"})

    def get(address: str) -> Any:
        if kind == "asgi":
            return asyncio.run(aget(address))
        return Client().get(address, headers={"accept": "application/json"})

    assert get("/one/").status_code == 200
    break_down("replica2")
    assert get("/one/").json() == {"Replicas(pool='default', min_replicas=1, max_lag=None)": "OK"}
    answer = get("/two/")
    assert answer.status_code == 500
    assert list(answer.json().values()) == [
        "Warning: 1 of 2 replicas of 'default' in the rotation (replica2: connect)"
    ]
    pools = {"default": site.PINNING_REPLICAS, "users": ["users_replica"]}
    break_down("users_replica")
    with override_settings(PINNING_REPLICAS=pools):
        answer = get("/users/")
    assert list(answer.json().values()) == [
        "Unavailable: 0 of 1 replicas of 'users' in the rotation (users_replica: connect)"
    ]


def test_the_pages_addresses() -> None:
    answer = Client().get("/health/", headers={"accept": "application/json"})
    assert answer.json() == {
        "Database(alias='default')": "OK",
        "Replicas(pool='default', min_replicas=1, max_lag=None)": "OK",
    }
    answer = Client().get("/health/replicas/", headers={"accept": "application/json"})
    assert list(answer.json()) == ["Replicas(pool='default', min_replicas=2, max_lag=30)"]
