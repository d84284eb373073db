from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from http.cookies import SimpleCookie
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.cache import cache
from django.db import connections
from django.test import AsyncClient, Client

from pinning_middleware.state import enter, entered_scope
from tests.app import views
from tests.settings import FOLDER

REPLICAS = ("replica1", "replica2", "users_replica")


@pytest.fixture(scope="session")
def django_db_modify_db_settings() -> Iterator[None]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    yield
    shutil.rmtree(FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: Any) -> None:
    """Give the replicas the tables that replication would have brought."""
    for alias in REPLICAS:
        primary = sqlite3.connect(settings.DATABASES["default"]["TEST"]["NAME"])
        replica = sqlite3.connect(settings.DATABASES[alias]["TEST"]["NAME"])
        primary.backup(replica)
        primary.close()
        replica.close()


@pytest.fixture(autouse=True)
def outside_any_scope() -> Iterator[None]:
    """What one test wrote pins no other."""
    outer = entered_scope()
    enter(None)
    yield
    enter(outer)


@pytest.fixture
def do() -> Iterator[Callable[[Callable[..., Any]], str]]:
    """Return a function that gives an action a view, by the last part of its address."""

    def register(action: Callable[..., Any]) -> str:
        name = f"action{len(views.actions)}"
        views.actions[name] = action
        return name

    yield register
    views.actions.clear()


@pytest.fixture
def replicate() -> Iterator[Callable[..., None]]:
    """Return a function that brings what the primary has to a replica, as replication would."""
    touched: set[str] = set()

    def copy(*aliases: str, source: str = "default") -> None:
        for alias in aliases or ("replica1", "replica2"):
            touched.add(alias)
            _copy(source, alias)

    yield copy
    for alias in touched:
        _empty(alias)


def _copy(source: str, target: str) -> None:
    primary = sqlite3.connect(connections[source].settings_dict["NAME"])
    replica = sqlite3.connect(connections[target].settings_dict["NAME"])
    primary.backup(replica)
    primary.close()
    replica.close()


def _empty(alias: str) -> None:
    replica = sqlite3.connect(connections[alias].settings_dict["NAME"])
    tables = replica.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        " AND name NOT LIKE 'django_%' AND name != 'auth_permission'"
    ).fetchall()
    for (table,) in tables:
        replica.execute(f'DELETE FROM "{table}"')
    replica.commit()
    replica.close()


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
    """Return a function that makes browsers; the test runs once under WSGI and once under ASGI."""
    return lambda **kwargs: Browser(request.param == "asgi", **kwargs)


@pytest.fixture
def browser(new_browser: Callable[..., Browser]) -> Browser:
    return new_browser()
