from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from http.cookies import SimpleCookie
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.apps import apps
from django.conf import settings
from django.core.cache import cache
from django.core.signals import setting_changed
from django.db import connections
from django.db.models import Model
from django.test import AsyncClient, Client, TransactionTestCase
from freezegun import freeze_time
from freezegun.api import FrozenDateTimeFactory
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis.configuration import set_hypothesis_home_dir

from pinning_middleware.not_found import retry_limit
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.route import take_decision
from pinning_middleware.scopes.overrides import current_overrides, set_overrides
from pinning_middleware.scopes.scope import enter, entered_scope
from pinning_middleware.servers import monitor
from pinning_middleware.stores import circuit_breaker
from pinning_middleware.testing import replicas
from pinning_middleware.utils import counters
from pinning_middleware.utils import logging as rate_limit
from tests.app import views
from tests.settings import FOLDER

REPLICAS = ("replica1", "replica2", "users_replica")
MIDDLEWARE = "pinning_middleware.middleware.PinningMiddleware"
ROUTER = "pinning_middleware.routers.PinningRouter"

# `pytest --hypothesis-profile=long` searches for other examples each time, and for more of them;
# `mutants` does not simplify what it finds.
set_hypothesis_home_dir(FOLDER / "hypothesis")
hypothesis_settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
CI = hypothesis_settings.get_profile("ci")
hypothesis_settings.register_profile("long", CI, max_examples=5000, derandomize=False)
hypothesis_settings.register_profile("mutants", CI, phases=[Phase.explicit, Phase.generate])
hypothesis_settings.load_profile("ci")


def where(name: str = "Book") -> str:
    """Return the alias that a read of this model would use."""
    model: Any = apps.get_model("app", name)
    return str(model.objects.db)


def is_replica(alias: str) -> bool:
    return alias in ("replica1", "replica2")


@pytest.fixture(scope="session")
def django_db_modify_db_settings() -> Iterator[None]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    yield
    shutil.rmtree(FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: Any) -> None:
    """Create the tables on the replicas, as replication would."""
    for alias in REPLICAS:
        primary = sqlite3.connect(settings.DATABASES["default"]["TEST"]["NAME"])
        replica = sqlite3.connect(settings.DATABASES[alias]["TEST"]["NAME"])
        primary.backup(replica)
        primary.close()
        replica.close()


@pytest.fixture(autouse=True)
def lenient_circuit_breaker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Healthy caches may be slow on a busy machine."""
    monkeypatch.setattr(circuit_breaker, "TIMEOUT", 3.0)


@pytest.fixture(autouse=True)
def outside_any_scope() -> Iterator[None]:
    """Isolate pins, so that a write of one test does not pin another."""
    outer, blocks = entered_scope(), current_overrides()
    enter(None)
    set_overrides(None)
    # Discard a routing decision of an earlier test without a read.
    take_decision("")
    yield
    enter(outer)
    set_overrides(blocks)
    monitor.stop()
    # Reset rate-limited logging and the status of servers, too. A test that stopped the clock has
    # left times that are ahead of it.
    rate_limit._last_logged.clear()
    retry_limit.reset()
    counters.reads.clear()
    if any(endpoint.status_since for pool in pools().all for endpoint in pool.endpoints.values()):
        setting_changed.send(
            sender=None, setting="PINNING_REPLICAS", value=settings.PINNING_REPLICAS, enter=False
        )


@pytest.fixture
def do() -> Iterator[Callable[[Callable[..., Any]], str]]:
    """Return a function that adds a view for an action; its name ends the URL path."""

    def register(action: Callable[..., Any]) -> str:
        name = f"action{len(views.actions)}"
        views.actions[name] = action
        return name

    yield register
    views.actions.clear()


@pytest.fixture
def named() -> Callable[..., None]:
    """
    Return a function that creates in databases an author, their book and a tag with the
    database's name, all with the key 1: the name identifies the database of a read.
    """

    def fill(*aliases: str) -> None:
        for alias in aliases or ("default", "replica1", "replica2"):
            if alias != "default":
                replicas.catch_up(alias)
            with closing(_open(alias)) as database, database:
                for statement in (
                    "REPLACE INTO app_author (id, name) VALUES (1, ?)",
                    "REPLACE INTO app_book (id, title, author_id) VALUES (1, ?, 1)",
                    "REPLACE INTO app_tag (id, name) VALUES (1, ?)",
                    "REPLACE INTO app_account (id, name) VALUES (1, ?)",
                    "REPLACE INTO app_slurpee (id, number) VALUES (1, length(?))",
                ):
                    database.execute(statement, [alias])
                database.execute(
                    "REPLACE INTO app_book_tags (id, book_id, tag_id) VALUES (1, 1, 1)"
                )

    return fill


@pytest.fixture
def clock() -> Iterator[FrozenDateTimeFactory]:
    """Stop the clock; `clock.tick(seconds)` advances it."""
    with freeze_time("2026-01-01 12:00:00", real_asyncio=True) as frozen:
        yield frozen


def _open(alias: str) -> sqlite3.Connection:
    database = sqlite3.connect(connections.settings[alias]["NAME"])
    database.execute("PRAGMA synchronous = OFF")
    return database


def change_behind(alias: str, statement: str) -> None:
    """Write to a database without the package recording it."""
    with closing(_open(alias)) as database, database:
        database.execute(statement)


def _empty(alias: str) -> None:
    with closing(_open(alias)) as database, database:
        tables = database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        ).fetchall()
        for (table,) in tables:
            if table not in ("django_migrations", "django_content_type", "auth_permission"):
                database.execute(f'DELETE FROM "{table}"')


@pytest.fixture(scope="session", autouse=True)
def flush_fast() -> Iterator[None]:
    """Django's flush takes 100 ms for each test, on seven databases."""

    def empty(self: TransactionTestCase) -> None:
        for alias in settings.DATABASES:
            _empty(alias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransactionTestCase, "_fixture_teardown", empty)
        yield


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    yield
    cache.clear()


class Browser:
    """Django's test client under WSGI or ASGI, with one interface."""

    def __init__(self, is_async: bool, **kwargs: Any) -> None:
        self.is_async = is_async
        self.client = AsyncClient(**kwargs) if is_async else Client(**kwargs)

    @property
    def cookies(self) -> SimpleCookie:
        return self.client.cookies

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        return async_to_sync(method) if self.is_async else method


@pytest.fixture(params=["wsgi", "asgi"])
def new_browser(request: pytest.FixtureRequest) -> Callable[..., Browser]:
    """Return a function that creates browsers; runs once under WSGI and once under ASGI."""
    return lambda **kwargs: Browser(request.param == "asgi", **kwargs)


@pytest.fixture
def browser(new_browser: Callable[..., Browser]) -> Browser:
    return new_browser()


class Visit:
    """Runs actions inside requests, and returns their results."""

    def __init__(self, browser: Browser, kind: str, do: Callable[..., str]) -> None:
        self.browser, self.kind, self._do = browser, kind, do
        self.response: Any = None

    def __call__(
        self, action: Callable[[Any], Any] | None = None, method: str = "get", **kwargs: Any
    ) -> Any:
        results = []

        def act(request: Any) -> str:
            results.append(where() if action is None else action(request))
            return "done"

        address = f"/{self.kind}/{self._do(act)}/"
        self.response = getattr(self.browser, method)(address, **kwargs)
        return results[0]


@pytest.fixture(params=["sync", "async"])
def visit(request: pytest.FixtureRequest, browser: Browser, do: Callable[..., str]) -> Visit:
    """
    Return a function that runs an action in a view, by default one that returns the read's alias:
    once for each of the two kinds of view, under WSGI and under ASGI.
    """
    return Visit(browser, request.param, do)


def saved(instance: Model) -> str | None:
    """Return the alias of an instance."""
    return instance._state.db
