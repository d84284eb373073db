"""``docs/how-to/coming-from.md``: the check for leftovers, and how to revert the migration."""

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
from tests.app.models import Book, Tag
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
    """A router for one model, whose primary is another database."""

    def db_for_read(self, model: Any, **hints: Any) -> Any:
        return "elsewhere" if model._meta.model_name == "account" else None

    def db_for_write(self, model: Any, **hints: Any) -> Any:
        return "users" if model._meta.model_name == "account" else None


class Several(Chance):
    def db_for_read(self, model: Any, **hints: Any) -> Any:
        return "elsewhere" if model._meta.model_name == "account" else "slave"

    def db_for_write(self, model: Any, **hints: Any) -> Any:
        return "users" if model._meta.model_name == "account" else "default"


class Flagged(Chance):
    """A replica only while a flag of the request is set."""

    flag = False

    def db_for_read(self, model: Any, **hints: Any) -> Any:
        return "slave" if self.flag else "default"


class Broken:
    def db_for_read(self, model: Any, **hints: Any) -> str:
        raise LookupError


class Warehouse:
    """A router with a database that is never written."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "elsewhere"


class Guarded(Warehouse):
    """A router with a database whose writes raise an error."""

    def db_for_write(self, model: Any, **hints: Any) -> str:
        raise RuntimeError("nobody writes there")


class Replicated(SyncMiddleware):
    """A router derived from a class of django_replicated."""


Replicated.__module__ = "django_replicated.middleware"


class Derived(Replicated):
    pass


def visit(client: Client, method: str = "get") -> str:
    enter(None)
    return str(getattr(client, method)("/").content.decode())


def index(request: HttpRequest) -> HttpResponse:
    """Return the alias that is read; write inside use_replica on POST."""
    with use_replica():
        if request.method == "PUT":
            Book.objects.create(title="new")
        inside = where()
    return HttpResponse(f"{inside} {where()}")


urlpatterns = [path("", index)]


def messages(**values: Any) -> list[tuple[str, str, str]]:
    with override_settings(**values):
        return [(str(one.id)[-4:], one.msg, str(one.hint)) for one in check_leftovers()]


def test_check_passes_without_leftovers() -> None:
    assert messages() == []
    assert messages(SLAVE_DATABASES=["slave"]) == []
    routers = ["pinning_middleware.routers.PinningRouter", "tests.app.routers.UsersRouter"]
    for name in ("Broken", "Warehouse", "Guarded"):
        assert messages(DATABASE_ROUTERS=[*routers, f"{__name__}.{name}"]) == []
    assert messages(MIDDLEWARE=["tests.app.middleware.SyncMiddleware", "not.there"]) == []


def test_check_reports_settings_of_other_packages() -> None:
    ((number, says, hint),) = messages(REPLICA_DATABASES=["replica1"])
    assert (number, says) == (
        "W201",
        "REPLICA_DATABASES is a setting of another package: it is not used here.",
    )
    assert hint == "Set PINNING_REPLICAS instead, and remove it."
    ((_, _, hint),) = messages(REPLICATED_READ_ONLY_TRIES=1)
    assert hint == "Remove it: this package needs no such setting."


def test_replacement_settings_exist() -> None:
    """Or functions of the API."""
    names = {ours.partition(" ")[0] for ours in SETTINGS.values() if ours}
    assert names - set(DEFAULTS) == {"use_primary"}


@pytest.mark.parametrize("name", SETTINGS)
def test_check_reports_each_setting(name: str) -> None:
    found = messages(**{name: []})
    assert [number for number, *_ in found] == ([] if name == "SLAVE_DATABASES" else ["W201"])


def test_check_ignores_settings_in_use(settings: Any) -> None:
    settings.DATABASE_ROUTERS = [OURS + ROUTER]
    settings.MULTIDB_PINNING_SECONDS = 5
    assert messages() == []
    ((_, says, _),) = messages(PINNING_SECONDS=6)
    assert says.endswith("PINNING_SECONDS takes precedence.")


def test_check_reports_entries_of_other_packages() -> None:
    ((number, says, hint),) = messages(MIDDLEWARE=[MIDDLEWARE])
    assert (number, says) == (
        "W202",
        f"MIDDLEWARE contains {MIDDLEWARE!r} of 'multidb'.",
    )
    assert "'pinning_middleware.middleware.PinningMiddleware'" in hint
    assert repr(OURS + MIDDLEWARE) in hint
    ((number, says, hint),) = messages(MIDDLEWARE=[f"{__name__}.Derived"])
    assert (number, "django_replicated" in says, "contrib" in hint) == ("W202", True, False)


def test_check_reports_derived_routers() -> None:
    entry = type("Own", (Chance,), {"__module__": "multidb"})()
    ((number, says, _),) = messages(DATABASE_ROUTERS=[entry])
    assert (number, "'Own' of 'multidb'" in says) == ("W202", True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Chance", "['elsewhere', 'slave']"),
        ("Split", "{'users': ['elsewhere']}"),
        ("Several", "{'default': ['slave'], 'users': ['elsewhere']}"),
        ("Flagged", "['slave']"),
    ],
)
def test_check_reports_custom_routers(name: str, value: str) -> None:
    found = messages(DATABASE_ROUTERS=[f"{__name__}.{name}"], PINNING_REPLICAS=[])
    ((number, says, hint),) = found
    assert number == "W203"
    assert says.startswith(f"{name} returns replicas for reads")
    assert f"PINNING_REPLICAS = {value}" in hint


class Foreign:
    """Reads one model from a database of another application, and writes none."""

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return "elsewhere" if model is Tag else None

    def db_for_write(self, model: Any, **hints: Any) -> None:
        return None


def test_check_ignores_routers_of_databases_that_are_only_read() -> None:
    assert messages(DATABASE_ROUTERS=[f"{__name__}.Foreign"], PINNING_REPLICAS=[]) == []


def test_check_ignores_routers_with_configured_replicas() -> None:
    replicas = ["slave", "elsewhere"]
    assert messages(DATABASE_ROUTERS=[f"{__name__}.Chance"], PINNING_REPLICAS=replicas) == []


# Migration of a live site


@pytest.mark.django_db(transaction=True, databases="__all__")
@pytest.mark.urls(__name__)
def test_write_inside_use_replica_pins() -> None:
    client = Client()
    inside, after = visit(client, "put").split()
    assert is_replica(inside)
    assert after == "default"
    assert visit(client).split()[1] == "default"


@pytest.mark.django_db(transaction=True, databases="__all__")
@pytest.mark.urls(__name__)
def test_two_ways_to_revert(settings: Any) -> None:
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
