"""What ``docs/coming-from.md`` says: the check that sees what is left, and the ways back."""

from __future__ import annotations

import random
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import Client, override_settings
from django.urls import path

from pinning_middleware import use_replica
from pinning_middleware.checks.migration import SETTINGS, check_leftovers
from pinning_middleware.conf import DEFAULTS
from pinning_middleware.scopes.scope import enter
from tests.app.middleware import SyncMiddleware
from tests.app.models import Book
from tests.conftest import is_replica, where

OURS = "pinning_middleware.contrib."
ROUTER = "multidb.PinningReplicaRouter"
MIDDLEWARE = "multidb.middleware.PinningRouterMiddleware"


class Chance:
    """The router of most tutorials."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return random.choice(["slave", "elsewhere"])

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "default"


class Split(Chance):
    """The same for one model, whose primary is another database."""

    def db_for_read(self, model: Any, **hints: Any) -> Any:
        return "elsewhere" if model._meta.model_name == "account" else None

    def db_for_write(self, model: Any, **hints: Any) -> Any:
        return "users" if model._meta.model_name == "account" else None


class Several(Chance):
    def db_for_read(self, model: Any, **hints: Any) -> Any:
        return "elsewhere" if model._meta.model_name == "account" else "slave"

    def db_for_write(self, model: Any, **hints: Any) -> Any:
        return "users" if model._meta.model_name == "account" else "default"


class Broken:
    def db_for_read(self, model: Any, **hints: Any) -> str:
        raise LookupError


class Warehouse:
    """It knows a database that nobody writes."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "elsewhere"


class Guarded(Warehouse):
    """The same, said by an error."""

    def db_for_write(self, model: Any, **hints: Any) -> str:
        raise RuntimeError("nobody writes there")


class Replicated(SyncMiddleware):
    """As derived from a class of django_replicated."""


Replicated.__module__ = "django_replicated.middleware"


class Derived(Replicated):
    pass


def visit(client: Client, method: str = "get") -> str:
    enter(None)
    return str(getattr(client, method)("/").content.decode())


def index(request: HttpRequest) -> HttpResponse:
    """Tell where this reads; write, if the method says so, where reads may be stale."""
    with use_replica():
        if request.method == "PUT":
            Book.objects.create(title="new")
        inside = where()
    return HttpResponse(f"{inside} {where()}")


urlpatterns = [path("", index)]


def said(**values: Any) -> list[tuple[str, str, str]]:
    with override_settings(**values):
        return [(str(one.id)[-4:], one.msg, str(one.hint)) for one in check_leftovers()]


def test_a_site_that_has_nothing_left_hears_nothing() -> None:
    assert said() == []
    assert said(SLAVE_DATABASES=["slave"]) == []
    routers = ["pinning_middleware.routers.PinningRouter", "tests.app.routers.UsersRouter"]
    for name in ("Broken", "Warehouse", "Guarded"):
        assert said(DATABASE_ROUTERS=[*routers, f"{__name__}.{name}"]) == []
    assert said(MIDDLEWARE=["tests.app.middleware.SyncMiddleware", "not.there"]) == []


def test_settings_of_other_packages() -> None:
    ((number, says, hint),) = said(REPLICA_DATABASES=["replica1"])
    assert (number, says) == (
        "W201",
        "REPLICA_DATABASES is a setting of another package. Nothing here reads it.",
    )
    assert hint == "Write PINNING_REPLICAS instead, and remove it."
    ((_, _, hint),) = said(REPLICATED_READ_ONLY_TRIES=1)
    assert hint == "Remove it: what it was for is done without it."


def test_every_successor_is_one() -> None:
    """Or a verb."""
    names = {ours.partition(" ")[0] for ours in SETTINGS.values() if ours}
    assert names - set(DEFAULTS) == {"use_primary"}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_seen(name: str) -> None:
    found = said(**{name: []})
    assert [number for number, *_ in found] == ([] if name == "SLAVE_DATABASES" else ["W201"])


def test_settings_that_are_read_are_none(settings: Any) -> None:
    settings.DATABASE_ROUTERS = [OURS + ROUTER]
    settings.MULTIDB_PINNING_SECONDS = 5
    assert said() == []
    ((_, says, _),) = said(PINNING_SECONDS=6)
    assert says.endswith("PINNING_SECONDS is set, so that this is not read.")


def test_entries_of_other_packages() -> None:
    ((number, says, hint),) = said(MIDDLEWARE=[MIDDLEWARE])
    assert (number, says) == (
        "W202",
        f"MIDDLEWARE has {MIDDLEWARE!r}, which is of 'multidb', beside ours.",
    )
    assert "'pinning_middleware.middleware.PinningMiddleware'" in hint
    assert repr(OURS + MIDDLEWARE) in hint
    ((number, says, hint),) = said(MIDDLEWARE=[f"{__name__}.Derived"])
    assert (number, "django_replicated" in says, "contrib" in hint) == ("W202", True, False)


def test_a_router_that_is_derived_from_one_of_theirs() -> None:
    entry = type("Own", (Chance,), {"__module__": "multidb"})()
    ((number, says, _),) = said(DATABASE_ROUTERS=[entry])
    assert (number, "'Own', which is of 'multidb'" in says) == ("W202", True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Chance", "['elsewhere', 'slave']"),
        ("Split", "{'users': ['elsewhere']}"),
        ("Several", "{'default': ['slave'], 'users': ['elsewhere']}"),
    ],
)
def test_a_router_that_was_written_by_hand(name: str, value: str) -> None:
    found = said(DATABASE_ROUTERS=[f"{__name__}.{name}"], PINNING_REPLICAS=[])
    ((number, says, hint),) = found
    assert number == "W203"
    assert says.startswith(f"{name} sends reads to replicas")
    assert f"PINNING_REPLICAS = {value}" in hint


def test_one_whose_replicas_are_ours_too_is_left_to_the_other_check() -> None:
    replicas = ["slave", "elsewhere"]
    assert said(DATABASE_ROUTERS=[f"{__name__}.Chance"], PINNING_REPLICAS=replicas) == []


# What the page says of a live site


@pytest.mark.django_db(transaction=True, databases="__all__")
@pytest.mark.urls(__name__)
def test_a_write_where_reads_may_be_stale_is_not_refused_and_pins() -> None:
    client = Client()
    inside, after = visit(client, "put").split()
    assert is_replica(inside)
    assert after == "default"
    assert visit(client).split()[1] == "default"


@pytest.mark.django_db(transaction=True, databases="__all__")
@pytest.mark.urls(__name__)
def test_the_two_ways_back(settings: Any) -> None:
    client = Client()
    settings.PINNING_ENABLED = False
    assert visit(client, "put") == "default default"
    assert not client.cookies
    settings.PINNING_ENABLED = True
    settings.PINNING_OFFLOAD = False
    inside, outside = visit(Client()).split()
    assert is_replica(inside)
    assert outside == "default"
    visit(client, "put")
    settings.PINNING_OFFLOAD = True
    assert visit(client).split()[1] == "default"
    assert is_replica(visit(Client()).split()[1])
