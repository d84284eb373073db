"""Pins in a real Valkey, positions of real PostgreSQL replicas that are held back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.sessions.backends.cache import SessionStore
from django.core.cache import caches
from django.db import transaction
from django.test import override_settings

from pinning_middleware import carry_keys, pin_keys, pinning_scope
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
        PINNING_KEY="tests.real.test_header.by_tenant",
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
    carry_keys(*keys)
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


def test_when_all_have_it_the_pin_is_forgotten(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    pg.pause()
    desk, phone = device("ada"), device("ada")
    desk(write)
    assert set(keyed.fetch(["ada"])) == {"pg"}
    pg.resume()
    look_around()
    assert phone() in REPLICAS
    assert keyed.fetch(["ada"]) == {}


def test_a_request_that_saw_the_older_write_forgets_no_newer_one(
    pg: PostgreSQL, device: Callable[..., Device]
) -> None:
    """It finds that all replicas have what it came with, while another device writes again."""
    pg.pause()
    desk, phone = device("ada"), device("ada")
    desk(write)
    pg.resume()
    look_around()

    def slow() -> str:
        answer = server()
        pg.pause()
        with pinning_scope() as scope:
            write()
        keyed.keep(["ada"], scope.pins)
        return answer

    assert phone(slow) in REPLICAS
    assert set(keyed.fetch(["ada"])) == {"pg"}
    assert desk() == "pg"


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
        assert keyed.fetch(["order:42"]) == {}
    (pin,) = keyed.fetch(["order:42"]).values()
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
