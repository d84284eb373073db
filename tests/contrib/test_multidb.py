"""The API of django-multidb-router, implemented by the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core import checks
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import pinning_scope, use_replica
from pinning_middleware.conf import DEFAULTS, MULTIDB_ALIASES, MULTIDB_DEFAULTS, conf
from pinning_middleware.contrib import multidb
from pinning_middleware.contrib.multidb import middleware as older
from pinning_middleware.contrib.multidb.pinning import (
    db_write,
    mark_as_write,
    pin_this_thread,
    this_thread_is_pinned,
    unpin_this_thread,
    use_master,
    use_primary_db,
)
from pinning_middleware.decorators import Block
from pinning_middleware.scopes.overrides import OverrideKind
from pinning_middleware.scopes.scope import enter, entered_scope
from pinning_middleware.utils.counters import rejected_tokens
from tests.app.models import Book
from tests.conftest import is_replica, where

pytestmark = [
    pytest.mark.django_db(transaction=True, databases="__all__"),
    pytest.mark.urls(__name__),
]

ROUTER = "multidb.PinningReplicaRouter"
MIDDLEWARE = "multidb.middleware.PinningRouterMiddleware"
OURS = "pinning_middleware.contrib."


class Subclass(older.PinningRouterMiddleware):
    """A middleware of a site: no cookie for robots, a special response for one path."""

    def process_request(self, request: HttpRequest) -> Any:
        if request.path == "/closed/":
            return HttpResponse("closed")
        return super().process_request(request)

    def process_response(self, request: HttpRequest, response: Any) -> Any:
        response.headers["X-Reads"] = where()
        # A query, which async code must not run.
        Book.objects.count()
        return super().process_response(request, response)


actions: dict[str, Callable[[HttpRequest], Any]] = {}


def view(request: HttpRequest, name: str) -> HttpResponse:
    found = actions[name](request)
    return found if isinstance(found, HttpResponse) else HttpResponse(str(found))


async def look(request: HttpRequest) -> HttpResponse:
    return HttpResponse(where())


@db_write
async def marked(request: HttpRequest) -> HttpResponse:
    return HttpResponse(where())


urlpatterns = [
    path("look/", look),
    path("marked/", marked),
    path("do/<str:name>/", view),
]


@pytest.fixture(autouse=True)
def site(settings: Any) -> Iterator[Any]:
    """The settings of a site that has changed only the dotted paths."""
    del settings.PINNING_REPLICAS
    settings.DATABASE_ROUTERS = [OURS + ROUTER]
    settings.MIDDLEWARE = [OURS + MIDDLEWARE]
    settings.REPLICA_DATABASES = ["replica1", "replica2"]
    yield settings
    actions.clear()


def do(action: Callable[[HttpRequest], Any], client: Client | None = None, **kwargs: Any) -> str:
    """Return the result of an action in a request."""
    name = f"action{len(actions)}"
    actions[name] = action
    enter(None)
    kwargs.setdefault("method", "GET")
    response = (client or Client()).generic(path=f"/do/{name}/", **kwargs)
    return str(response.content.decode())


def write(request: Any = None) -> str:
    Book.objects.create(title="new")
    return where()


def read(request: Any = None) -> str:
    return where()


# Settings


def test_multidb_settings_are_used(site: Any) -> None:
    site.MULTIDB_PINNING_COOKIE = "theirs"
    site.MULTIDB_PINNING_SECONDS = 60
    site.MULTIDB_PINNING_COOKIE_SECURE = True
    site.MULTIDB_PINNING_COOKIE_HTTPONLY = True
    site.MULTIDB_PINNING_COOKIE_SAMESITE = "Strict"
    assert conf.replicas == {"default": {"replica1": 1, "replica2": 1}}
    assert (conf.cookie_name, conf.seconds) == ("theirs", 60.0)
    flags = [conf.cookie[name] for name in ("secure", "httponly", "samesite")]
    assert flags == [True, True, "Strict"]


def test_pinning_settings_take_precedence(site: Any) -> None:
    site.MULTIDB_PINNING_COOKIE, site.PINNING_COOKIE_NAME = "theirs", "ours"
    site.PINNING_REPLICAS = ["replica2"]
    assert conf.cookie_name == "ours"
    assert conf.replicas == {"default": {"replica2": 1}}


def test_slave_databases_setting_is_used(site: Any) -> None:
    del site.REPLICA_DATABASES
    assert conf.replicas == {}
    site.SLAVE_DATABASES = ["replica1"]
    assert conf.replicas == {"default": {"replica1": 1}}


@pytest.mark.parametrize("left", ["DATABASE_ROUTERS", "MIDDLEWARE"])
def test_router_or_middleware_enables_multidb_settings(site: Any, left: str) -> None:
    setattr(site, left, [])
    assert conf.uses_multidb_names
    assert conf.cookie_name == "multidb_pin_writes"


def test_multidb_settings_are_ignored_otherwise(site: Any) -> None:
    site.DATABASE_ROUTERS, site.MIDDLEWARE = ["pinning_middleware.routers.PinningRouter"], []
    site.MULTIDB_PINNING_COOKIE = "theirs"
    assert (conf.replicas, conf.cookie_name) == ({}, "pinning")


def test_each_multidb_setting_has_a_replacement() -> None:
    assert set(MULTIDB_DEFAULTS) <= set(MULTIDB_ALIASES) <= set(DEFAULTS)


def test_system_checks_pass(site: Any) -> None:
    assert [one for one in checks.run_checks() if one.is_serious()] == []


# The old and the new cookie


def test_old_process_understands_the_cookie() -> None:
    """The old package only checks for the name of the cookie."""
    client = Client()
    do(write, client)
    assert "multidb_pin_writes" in client.cookies


def test_old_cookie_pins_only_its_request(clock: FrozenDateTimeFactory) -> None:
    client = Client()
    client.cookies["multidb_pin_writes"] = "y"
    assert do(read, client) == "default"
    assert is_replica(do(read))
    assert client.cookies["multidb_pin_writes"].value == "y"


# The middleware


def test_write_pins_until_the_window_ends(clock: FrozenDateTimeFactory) -> None:
    client = Client()
    assert do(write, client) == "default"
    assert do(read, client) == "default"
    assert is_replica(do(read))
    clock.tick(16)
    assert is_replica(do(read, client))


def test_only_writes_pin_whatever_the_method() -> None:
    client = Client()
    assert do(read, client, method="POST") == "default"
    assert is_replica(do(read, client))
    do(write, client)
    assert do(read, client) == "default"


def test_marked_response_pins() -> None:
    def mark(request: HttpRequest) -> HttpResponse:
        response = HttpResponse(where())
        response._db_write = True  # type: ignore[attr-defined]
        return response

    client = Client()
    assert is_replica(do(mark, client))
    assert do(read, client) == "default"


def test_db_write(site: Any) -> None:
    """Under either middleware: the mark is a pin, too."""
    for path_of in (OURS + MIDDLEWARE, "pinning_middleware.middleware.PinningMiddleware"):
        site.MIDDLEWARE = [path_of]
        client = Client()
        assert do(db_write(lambda request: HttpResponse(where())), client) == "default"
        assert do(read, client) == "default"


def test_db_write_async_view() -> None:
    async def visit() -> list[str]:
        client = AsyncClient()
        return [
            (await client.get(f"/{name}/")).content.decode() for name in ("look", "marked", "look")
        ]

    before, during, after = async_to_sync(visit)()
    assert is_replica(before)
    assert (during, after) == ("default", "default")


def test_overridden_hooks_are_called(site: Any) -> None:
    site.MIDDLEWARE = [f"{__name__}.Subclass"]
    site.PINNING_REPLICAS = ["replica1", "replica2"]
    client = Client()
    assert client.get("/closed/").content == b"closed"
    assert is_replica(client.get("/look/").headers["X-Reads"])

    async def visit() -> Any:
        return await AsyncClient().get("/look/"), await AsyncClient().get("/closed/")

    seen, closed = async_to_sync(visit)()
    assert is_replica(seen.headers["X-Reads"])
    assert closed.content == b"closed"


def test_hooks_called_directly() -> None:
    """As tests of a subclass of the middleware do."""
    halves = older.PinningRouterMiddleware(lambda request: HttpResponse())
    first = RequestFactory().get("/")
    halves.process_request(first)
    write()
    response = halves.process_response(first, HttpResponse())
    second = RequestFactory().get("/")
    second.COOKIES = {name: morsel.value for name, morsel in response.cookies.items()}
    enter(None)
    halves.process_request(second)
    assert this_thread_is_pinned()
    halves.process_request(RequestFactory().get("/"))
    assert not this_thread_is_pinned()


# The API


def test_pin_this_thread_lasts_for_the_scope() -> None:
    client = Client()

    def pin(request: HttpRequest) -> str:
        before = where()
        pin_this_thread()
        return f"{is_replica(before)} {where()} {this_thread_is_pinned()}"

    assert do(pin, client) == "True default True"
    assert is_replica(do(read, client))


def test_pin_this_thread_outside_a_scope_lasts_until_unpinned(clock: FrozenDateTimeFactory) -> None:
    """For example in commands and workers."""
    pin_this_thread()
    clock.tick(3600)
    assert where() == "default"
    assert this_thread_is_pinned()
    unpin_this_thread()
    assert is_replica(where())
    assert not this_thread_is_pinned()


def test_pin_this_thread_inside_use_primary_db() -> None:
    """In django-multidb-router, leaving the context manager removes the pin."""
    with pinning_scope():
        with use_primary_db:
            pin_this_thread()
        assert where() == "default"


def test_use_primary_db_nested() -> None:
    with pinning_scope():
        with use_primary_db, use_primary_db:
            pass
        assert is_replica(where())
        with use_primary_db:
            assert this_thread_is_pinned()
            with use_replica():
                assert not this_thread_is_pinned()
                assert is_replica(where())
            unpin_this_thread()
            assert where() == "default"


def test_thread_is_pinned_while_a_view_is_run_again_on_the_primary() -> None:
    with pinning_scope(), Block(OverrideKind.RETRY_404):
        assert where() == "default"
        assert this_thread_is_pinned()


def test_use_primary_db_decorates_async_functions() -> None:
    assert async_to_sync(use_primary_db(_where))() == "default"
    assert is_replica(async_to_sync(_where)())


async def _where() -> str:
    return where()


def test_mark_as_write_outside_a_request() -> None:
    assert mark_as_write(HttpResponse()).status_code == 200
    assert entered_scope() is None


def test_this_thread_is_pinned_without_a_scope() -> None:
    enter(None)
    assert not this_thread_is_pinned()


def test_get_replica_round_robin() -> None:
    assert {multidb.get_replica() for _ in range(4)} == {"replica1", "replica2"}


def test_get_replica_of_a_disabled_site() -> None:
    with override_settings(PINNING_ENABLED=False):
        assert multidb.get_replica() == "default"


def test_cookie_of_the_other_package_is_not_counted_as_rejected(site: Any) -> None:
    client = Client()
    client.cookies["multidb_pin_writes"] = "y"
    before = dict(rejected_tokens)
    client.get("/look/")
    assert dict(rejected_tokens) == before


def test_get_replica_in_a_dry_run(site: Any) -> None:
    site.REPLICA_DATABASES = []
    with override_settings(PINNING_DRY_RUN={"default": 2}):
        assert multidb.get_replica() == "default"


@override_settings(PINNING_ENABLED=False)
def test_hooks_of_a_subclass_run_while_pinning_is_disabled(site: Any) -> None:
    site.MIDDLEWARE = [f"{__name__}.Subclass"]
    response = Client().get("/closed/")
    assert response.content == b"closed"
    assert response.headers["X-Reads"] == "default"


def test_get_replica_without_replicas(site: Any) -> None:
    site.REPLICA_DATABASES = []
    assert multidb.get_replica() == "default"
    assert where() == "default"


@pytest.mark.parametrize(
    ("call", "now"),
    [
        (multidb.get_slave, "get_replica"),
        (multidb.MasterSlaveRouter, "ReplicaRouter"),
        (multidb.PinningMasterSlaveRouter, "PinningReplicaRouter"),
        (use_master.__enter__, "use_primary_db"),
    ],
)
def test_deprecated_names_warn(call: Callable[[], Any], now: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"Use {now}"):
        call()


# The router


def test_router_allow_migrate_and_allow_relation(site: Any) -> None:
    router = multidb.PinningReplicaRouter()
    site.PINNING_REPLICAS = {"default": ["replica1"], "users": ["users_replica"]}
    answers = {alias: router.allow_migrate(alias, "app") for alias in site.DATABASES}
    assert {alias for alias, answer in answers.items() if answer} == {"default", "users"}
    assert router.allow_relation(Book(), Book())


def test_routers_before_it_take_precedence(site: Any) -> None:
    site.DATABASE_ROUTERS = ["tests.app.routers.UsersRouter", OURS + ROUTER]
    assert where("Account") == "users"
    assert is_replica(where())
