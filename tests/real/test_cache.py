"""Pins in a real Valkey, positions of real PostgreSQL replicas that are held back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.contrib.sessions.backends.cache import SessionStore
from django.core.cache import caches
from django.db import connections, transaction
from django.test import override_settings

from pinning_middleware import follow_keys, pin_keys, pinning_scope
from pinning_middleware.stores import cache as keyed
from tests.app.models import Book
from tests.conftest import Browser
from tests.real.conftest import PostgreSQL, look_around, server
from tests.valkey import pins_in, redis_cache, valkey

__all__ = ["valkey"]

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}
STORE = "pinning_middleware.stores.CacheStore"


@pytest.fixture(autouse=True)
def on_valkey(valkey: str) -> Iterator[None]:
    with pins_in(
        redis_cache(valkey),
        PINNING_SECONDS=600,
        PINNING_STORES=[STORE],
        PINNING_USER_KEY="tests.real.test_header.by_tenant",
    ):
        caches["pins"].clear()
        yield


class Device:
    """A browser of a user; what it runs in a request is returned."""

    def __init__(self, browser: Browser, do: Callable[..., str], user: str | None) -> None:
        self._browser, self._do = browser, do
        self._headers = {"Tenant": user} if user else {}

    def __call__(self, action: Callable[[], Any] = server) -> Any:
        found: list[Any] = []
        address = f"/sync/{self._do(lambda request: found.append(action()))}/"
        self._browser.get(address, headers=self._headers)
        return found[0]


@pytest.fixture
def device(new_browser: Callable[..., Browser], do: Callable[..., str]) -> Callable[..., Device]:
    return lambda user=None: Device(new_browser(), do, user)


def write(*keys: str) -> None:
    Book.objects.create(title="new")
    if keys:
        pin_keys(*keys, using="pg")


def sees(*keys: str) -> tuple[bool, str]:
    follow_keys(*keys)
    return Book.objects.filter(title="new").exists(), server()


def test_a_user_is_pinned_on_all_devices(pg: PostgreSQL, device: Callable[..., Device]) -> None:
    pg.pause()
    desk, phone, other = device("ada"), device("ada"), device("grace")
    desk(write)
    assert (desk(), phone()) == ("pg", "pg")
    assert other() in REPLICAS
    assert device()() in REPLICAS


def test_a_replica_that_has_it_serves_all_devices(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    pg.pause("pg2")
    desk, phone = device("ada"), device("ada")
    desk(write)
    pg.wait_for("pg1")
    assert [phone() for _ in range(4)] == ["pg1"] * 4


def test_a_pin_that_is_passed_stays_until_its_own_end(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    """A read takes nothing away, so it can't take another device's newer pin away."""
    pg.pause()
    desk, phone = device("ada"), device("ada")
    desk(write)
    kept = keyed.fetch("user", ["ada"])
    assert set(kept) == {"pg"}
    pg.resume()
    look_around()
    assert phone() in REPLICAS
    assert keyed.fetch("user", ["ada"]) == kept


def test_a_hundred_parallel_requests_of_one_user_lose_no_pin(
    pg: PostgreSQL, do: Callable[..., str]
) -> None:
    """Each writes, and each one's position is in what the next device reads."""
    pg.pause()
    tokens_of: list[str] = []

    def act(number: int) -> None:
        try:
            with pinning_scope(isolated=True) as scope:
                write(f"order:{number}")
            keyed.keep("user", ["ada"], scope.pins)
            tokens_of.append(str(max((scope.pins["pg"].position or {}).values())))
        finally:
            connections.close_all()

    with ThreadPoolExecutor(10) as executor:
        list(executor.map(act, range(100)))
    (pin,) = keyed.fetch("user", ["ada"]).values()
    assert max((pin.position or {}).values()) == max(map(int, tokens_of))
    assert len(tokens_of) == 100


def test_everybody_who_opens_it_sees_an_order_as_it_is(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    pg.pause()
    device("ada")(lambda: write("order:42", "order:43"))
    visitor = device()
    assert visitor(lambda: sees("order:42")) == (True, "pg")
    assert visitor(lambda: sees("order:7", "order:43")) == (True, "pg")
    seen, alias = visitor(lambda: sees("order:7"))
    assert (seen, alias in REPLICAS) == (False, True)


def test_who_opens_it_later_reads_a_replica_that_has_it(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    pg.pause("pg1")
    device("ada")(lambda: write("order:42"))
    pg.wait_for("pg2")
    assert [device()(lambda: sees("order:42")) for _ in range(3)] == [(True, "pg2")] * 3


def test_a_script_pins_keys_when_its_transaction_commits(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    pg.pause()
    with transaction.atomic(using="pg"):
        write("order:42")
        assert keyed.fetch("key", ["order:42"]) == {}
    (pin,) = keyed.fetch("key", ["order:42"]).values()
    assert pin.position
    assert device()(lambda: sees("order:42")) == (True, "pg")


def test_the_position_of_a_key_covers_what_somebody_else_wrote(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    """A request that writes nothing and pins a key: all that the primary has by then counts."""
    pg.pause()
    with pinning_scope():
        write()
    device("ada")(lambda: pin_keys("order:42"))
    assert device()(lambda: sees("order:42")) == (True, "pg")


@pytest.mark.parametrize("store", [STORE, "tests.test_stores.SessionStore"])
def test_a_store_of_your_own_keeps_positions_too(
    pg: PostgreSQL, do: Callable[..., str], new_browser: Callable[..., Browser], store: str
) -> None:
    pg.pause("pg2")
    session = SessionStore()
    session.create()
    with override_settings(
        PINNING_STORES=[store], SESSION_ENGINE="django.contrib.sessions.backends.cache"
    ):
        browser = new_browser()
        browser.cookies["sessionid"] = session.session_key
        found: list[str] = []
        browser.get(f"/sync/{do(lambda request: write())}/", headers={"Tenant": "ada"})
        pg.wait_for("pg1")
        read = f"/sync/{do(lambda request: found.append(server()))}/"
        for _ in range(3):
            browser.get(read, headers={"Tenant": "ada"})
    assert found == ["pg1"] * 3
