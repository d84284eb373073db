"""Clients without cookies, with paused PostgreSQL replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.http import HttpRequest
from django.test import override_settings

from pinning_middleware import pinning_scope, tokens
from pinning_middleware.pins import PinKey
from tests.app.models import Book
from tests.conftest import Browser
from tests.real.conftest import PostgreSQL, probe_replicas, server

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}


def by_tenant(request: HttpRequest) -> str | None:
    return request.headers.get("Tenant")


@pytest.fixture(autouse=True)
def by_header() -> Iterator[None]:
    with override_settings(
        PINNING_STORES=["pinning_middleware.stores.HeaderStore"], PINNING_SECONDS=600
    ):
        yield


class Script:
    """A client that sends the last received token header."""

    def __init__(self, browser: Browser, do: Callable[..., str]) -> None:
        self._browser, self._do = browser, do
        self.token = ""

    def __call__(self, action: Callable[[], Any] = server) -> Any:
        found: list[Any] = []
        address = f"/sync/{self._do(lambda request: found.append(action()))}/"
        headers = {"Pinning-Token": self.token} if self.token else {}
        response = self._browser.get(address, headers=headers)
        self.token = response.headers.get("Pinning-Token", self.token)
        return found[0]


@pytest.fixture
def new_script(new_browser: Callable[..., Browser], do: Callable[..., str]) -> Callable[[], Script]:
    return lambda: Script(new_browser(), do)


def write() -> None:
    Book.objects.create(title="new")


def test_script_reads_its_writes(pg: PostgreSQL, new_script: Callable[[], Script]) -> None:
    pg.pause()
    script, other = new_script(), new_script()
    script(write)
    assert script(lambda: (Book.objects.count(), server())) == (1, "pg")
    assert other() in REPLICAS


def test_script_reads_a_replica_that_has_caught_up(
    pg: PostgreSQL, new_script: Callable[[], Script]
) -> None:
    pg.pause("pg1")
    script = new_script()
    script(write)
    pg.wait_for("pg2")
    assert [script() for _ in range(3)] == ["pg2"] * 3


def test_token_is_kept_when_all_replicas_have_caught_up(
    pg: PostgreSQL, new_script: Callable[[], Script]
) -> None:
    pg.pause()
    script = new_script()
    script(write)
    assert script.token
    pg.resume()
    probe_replicas()
    kept = script.token
    assert script() in REPLICAS
    assert script.token == kept


def test_token_propagates_to_another_service(
    pg: PostgreSQL, new_script: Callable[[], Script]
) -> None:
    """A job writes, and calls the site without a user."""
    pg.pause()
    with pinning_scope() as job:
        write()
    script = new_script()
    script.token = job.token or ""
    assert script() == "pg"
    assert set(tokens.loads(script.token)) == {PinKey("pg")}
