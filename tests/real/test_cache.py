"""Pins in a real Valkey, with positions of paused PostgreSQL replicas."""

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
from pinning_middleware.pins import PinKey
from pinning_middleware.stores import cache as keyed
from tests.app.models import Book
from tests.conftest import Browser
from tests.real.conftest import PostgreSQL, position_in, probe_replicas, server
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
    """A browser of a user; calling it runs an action in a request and returns the result."""

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


def test_user_is_pinned_on_all_devices(pg: PostgreSQL, device: Callable[..., Device]) -> None:
    pg.pause()
    desk, phone, other = device("ada"), device("ada"), device("grace")
    desk(write)
    assert (desk(), phone()) == ("pg", "pg")
    assert other() in REPLICAS
    assert device()() in REPLICAS


def test_caught_up_replica_is_used_for_all_devices(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    pg.pause("pg2")
    desk, phone = device("ada"), device("ada")
    desk(write)
    pg.wait_for("pg1")
    assert [phone() for _ in range(4)] == ["pg1"] * 4


def test_satisfied_pin_is_kept_until_it_expires(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    """A read removes no pin, so it cannot remove a newer pin of another device."""
    pg.pause()
    desk, phone = device("ada"), device("ada")
    desk(write)
    kept = keyed.load_pins("user", ["ada"])
    assert set(kept) == {PinKey("pg")}
    pg.resume()
    probe_replicas()
    assert phone() in REPLICAS
    assert keyed.load_pins("user", ["ada"]) == kept


def test_hundred_parallel_requests_of_a_user_lose_no_pin(
    pg: PostgreSQL, do: Callable[..., str]
) -> None:
    """Each request writes, and the next device inherits the position of each."""
    pg.pause()
    tokens_of: list[str] = []

    def act(number: int) -> None:
        try:
            with pinning_scope(isolated=True) as scope:
                write(f"order:{number}")
            keyed.save_pins("user", ["ada"], scope.pins)
            tokens_of.append(str(max(position_in(scope.token).values())))
        finally:
            connections.close_all()

    with ThreadPoolExecutor(10) as executor:
        list(executor.map(act, range(100)))
    (pin,) = keyed.load_pins("user", ["ada"]).values()
    assert max(pin.position.points.values()) == max(map(int, tokens_of))
    assert len(tokens_of) == 100


def test_followers_of_a_key_read_current_data(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    pg.pause()
    device("ada")(lambda: write("order:42", "order:43"))
    visitor = device()
    assert visitor(lambda: sees("order:42")) == (True, "pg")
    assert visitor(lambda: sees("order:7", "order:43")) == (True, "pg")
    seen, alias = visitor(lambda: sees("order:7"))
    assert (seen, alias in REPLICAS) == (False, True)


def test_later_followers_of_a_key_read_a_caught_up_replica(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    pg.pause("pg1")
    device("ada")(lambda: write("order:42"))
    pg.wait_for("pg2")
    assert [device()(lambda: sees("order:42")) for _ in range(3)] == [(True, "pg2")] * 3


def test_script_pins_keys_on_commit(pg: PostgreSQL, device: Callable[..., Device]) -> None:
    pg.pause()
    with transaction.atomic(using="pg"):
        write("order:42")
        assert keyed.load_pins("key", ["order:42"]) == {}
    (pin,) = keyed.load_pins("key", ["order:42"]).values()
    assert pin.position
    assert device()(lambda: sees("order:42")) == (True, "pg")


def test_position_of_a_key_includes_writes_of_others(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    """A request without a write pins a key with the primary's current position."""
    pg.pause()
    with pinning_scope():
        write()
    device("ada")(lambda: pin_keys("order:42"))
    assert device()(lambda: sees("order:42")) == (True, "pg")


@pytest.mark.parametrize("store", [STORE, "tests.test_stores.SessionStore"])
def test_custom_store_keeps_positions(
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
