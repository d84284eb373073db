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

# The URLs of the page.
PAGE = load("how-to/integrations.md", "django-health-check")["shop/urls"]
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
    """Return a function that makes replicas unreachable."""

    def move(*aliases: str) -> None:
        for alias in aliases:
            monkeypatch.setitem(connections.settings[alias], "NAME", "/nowhere/at/all.sqlite3")

    return move


def result(**options: Any) -> Any:
    """Return the error of the check, or None."""
    return asyncio.run(Replicas(**options).get_result()).error


def test_healthy_with_enough_replicas() -> None:
    assert result() is None
    assert result(min_replicas=2) is None


def test_warning_below_min_replicas(break_down: Any) -> None:
    break_down("replica2")
    assert result() is None
    error = result(min_replicas=2)
    assert type(error) is ServiceWarning
    assert error.message == "1 of 2 replicas of 'default' in rotation (replica2: unreachable)"


def test_unavailable_without_replicas(break_down: Any) -> None:
    break_down("replica1", "replica2")
    error = result()
    assert type(error) is ServiceUnavailable
    assert error.message == (
        "0 of 2 replicas of 'default' in rotation (replica1: unreachable, replica2: unreachable)"
    )
    # Without a minimum, no replica at all is still an error.
    assert type(result(min_replicas=0)) is ServiceUnavailable


def test_warning_for_a_promoted_replica() -> None:
    registry.mark_down(registry.endpoint("replica1", "default"), "promoted", 1000, "promoted")
    error = result(min_replicas=2)
    assert type(error) is ServiceWarning
    assert "replica1: promoted" in error.message


def test_weight_zero_does_not_count() -> None:
    with override_settings(PINNING_REPLICAS={"default": {"replica1": 1, "replica2": 0}}):
        assert result() is None
        assert result(min_replicas=2).message == "1 of 1 replicas of 'default' in rotation"


def test_unavailable_with_unknown_lag() -> None:
    """SQLite has no positions."""
    error = result(max_lag=10)
    assert type(error) is ServiceUnavailable
    assert "replica1: lag unknown" in error.message


def test_unavailable_for_unknown_pool() -> None:
    error = result(pool="nothing")
    assert type(error) is ServiceUnavailable
    assert error.message == "'nothing' is not a primary in PINNING_REPLICAS"


@pytest.mark.parametrize(
    "settings", [{"PINNING_ENABLED": False}, {"PINNING_REPLICAS": {"default": {"replica1": 0}}}]
)
def test_warning_if_settings_use_no_replica(settings: dict[str, Any]) -> None:
    with override_settings(**settings):
        error = result()
    assert type(error) is ServiceWarning
    assert "goes to the primary: see PINNING_ENABLED" in error.message


def test_check_counts_no_read_and_opens_no_scope() -> None:
    before = dict(counters.reads)
    enter(None)
    assert result() is None
    assert counters.reads == before
    assert entered_scope() is None


@pytest.mark.parametrize("kind", ["wsgi", "asgi"])
def test_health_check_view(kind: str, break_down: Any) -> None:
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
        "Warning: 1 of 2 replicas of 'default' in rotation (replica2: unreachable)"
    ]
    pools = {"default": site.PINNING_REPLICAS, "users": ["users_replica"]}
    break_down("users_replica")
    with override_settings(PINNING_REPLICAS=pools):
        answer = get("/users/")
    assert list(answer.json().values()) == [
        "Unavailable: 0 of 1 replicas of 'users' in rotation (users_replica: unreachable)"
    ]


def test_urls_of_the_documentation() -> None:
    answer = Client().get("/health/", headers={"accept": "application/json"})
    assert answer.json() == {
        "Database(alias='default')": "OK",
        "Replicas(pool='default', min_replicas=1, max_lag=None)": "OK",
    }
    answer = Client().get("/health/replicas/", headers={"accept": "application/json"})
    assert list(answer.json()) == ["Replicas(pool='default', min_replicas=2, max_lag=30)"]
