from __future__ import annotations

import functools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, async_to_sync
from django.core.cache import caches
from django.core.cache.backends.base import BaseCache
from django.test import override_settings
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware.pins import Pin, Pins, merge_pins
from pinning_middleware.stores import cache as keyed
from tests.caches import calls
from tests.valkey import LOCMEM, on_valkey, pins_in, redis_cache, running, valkey

__all__ = ["on_valkey", "valkey"]

FETCHES: dict[str, Callable[[list[str]], dict[str, Pin]]] = {
    "sync": keyed.fetch,
    "async": async_to_sync(keyed.afetch),
}
KEEPS: dict[str, Callable[..., None]] = {"sync": keyed.keep, "async": async_to_sync(keyed.akeep)}


@pytest.fixture(params=["locmem", "async-locmem", "valkey"])
def cache(request: pytest.FixtureRequest) -> Iterator[BaseCache]:
    """Each kind of cache, empty."""
    if request.param == "valkey":
        entry = redis_cache(request.getfixturevalue("valkey"))
    elif request.param == "locmem":
        entry = {**LOCMEM, "LOCATION": "pins"}
    else:
        entry = {"BACKEND": "tests.caches.AsyncCache", "LOCATION": "pins"}
    with pins_in(entry):
        caches["pins"].clear()
        yield caches["pins"]


@pytest.fixture(params=["sync", "async"])
def fetch(request: pytest.FixtureRequest) -> Callable[..., dict[str, Pin]]:
    return lambda *keys: FETCHES[request.param]("key", list(keys))


@pytest.fixture(params=["sync", "async"])
def keep(request: pytest.FixtureRequest) -> Callable[..., None]:
    return functools.partial(KEEPS[request.param], "key")


def pin(minutes: float = 15, point: int | None = None, held: float = 0.0, log: str = "1") -> Pin:
    """A pin in whole milliseconds, as all caches keep it; of minutes, for busy machines."""
    until = _in(minutes)
    if point is None:
        return Pin(until, until)
    return Pin(until, _in(held) if held else 0.0, {log: point})


def _in(minutes: float) -> float:
    return round(time.time() + 60 * minutes, 3)


def about(pins: Pins) -> Any:
    return {
        alias: (pytest.approx(p.until, abs=0.002), pytest.approx(p.held, abs=0.002), p.position)
        for alias, p in pins.items()
    }


def test_nothing_is_there_at_first(cache: BaseCache, fetch: Callable[..., Pins]) -> None:
    assert fetch("a") == {}
    assert fetch("a", "b") == {}
    assert fetch() == {}


def test_pins_of_several_keys_come_back_merged(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    one, other = {"default": pin(5, 10)}, {"default": pin(9, 3), "users": pin(2)}
    keep(["a"], one)
    keep(["b"], other)
    assert fetch("a") == about(one)
    assert fetch("b", "c") == about(other)
    assert fetch("a", "b") == about(merge_pins(one, other))


def test_one_call_pins_many_keys(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    pins = {"default": pin(5, 10)}
    names = [f"order:{number}" for number in range(50)]
    keep(names, pins)
    assert all(fetch(name) == about(pins) for name in names)
    assert fetch(*names) == about(pins)


@pytest.mark.parametrize("key", ["x" * 300, "with blanks\n", "ä€😀", "a|b"])
def test_any_text_is_a_key(cache: BaseCache, key: str) -> None:
    """Also one that memcached would refuse, of which Django would warn."""
    keyed.keep("key", [key], {"default": pin(5, 1)})
    assert set(keyed.fetch("key", [key])) == {"default"}


def test_the_newest_position_and_the_latest_end_win(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    newer, older = pin(5, 2**60 + 1), pin(9, 2**60)
    for first, second in ((newer, older), (older, newer)):
        cache.clear()
        keep(["a"], {"default": first})
        keep(["a"], {"default": second})
        assert fetch("a") == about({"default": Pin(older.until, 0.0, {"1": 2**60 + 1})})


def test_longer_numbers_are_larger_ones(cache: BaseCache, fetch: Callable[..., Pins]) -> None:
    keyed.keep("key", ["a"], {"default": pin(5, 9)})
    keyed.keep("key", ["a"], {"default": pin(5, 10)})
    assert fetch("a")["default"].position == {"1": 10}
    keyed.keep("key", ["a"], {"default": pin(5, 9)})
    assert fetch("a")["default"].position == {"1": 10}


def test_a_pin_without_a_position_holds_the_position_back(cache: BaseCache) -> None:
    held, told = pin(5), pin(9, 7)
    keyed.keep("key", ["a"], {"default": held})
    keyed.keep("key", ["a"], {"default": told})
    assert keyed.fetch("key", ["a"]) == about({"default": Pin(told.until, held.until, {"1": 7})})


def test_a_pin_of_the_window_alone_is_held_by_it_as_well(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    """As a token carries it that had no room for its positions."""
    alone, told = Pin(_in(9)), pin(5, 7)
    keep(["a"], {"default": alone})
    keep(["a"], {"default": told})
    assert fetch("a")["default"].waits_for(time.time()) is None


def test_after_a_promotion_the_older_log_ends_with_its_window(
    cache: BaseCache, fetch: Callable[..., Pins], clock: FrozenDateTimeFactory
) -> None:
    """No replica follows it any more, so until then the primary serves, and no longer."""
    keyed.keep("key", ["a"], {"default": pin(5, 9, log="1")})
    clock.tick(1 * 60)
    keyed.keep("key", ["a"], {"default": pin(9, 3, log="2")})
    found = fetch("a")["default"]
    waits = found.waits_for(time.time())
    assert waits is None or "1" in waits
    clock.tick(6 * 60)
    assert fetch("a")["default"].waits_for(time.time()) == {"2": 3}


def test_a_window_that_ended_is_not_told(
    cache: BaseCache, fetch: Callable[..., Pins], clock: FrozenDateTimeFactory
) -> None:
    keyed.keep("key", ["a"], {"default": pin(5, 1), "users": pin(9, 1)})
    clock.tick(6 * 60)
    assert set(fetch("a")) == {"users"}
    clock.tick(6 * 60)
    assert fetch("a") == {}


def test_what_is_over_is_not_kept(cache: BaseCache, keep: Callable[..., None]) -> None:
    keep(["a"], {"default": pin(-1, 1)})
    assert keyed.fetch("key", ["a"]) == {}


def test_the_cache_drops_a_key_with_its_window(on_valkey: None) -> None:
    client = keyed._redis(caches["pins"])
    keyed.keep("key", ["a"], {"default": pin(9, 1)})
    keyed.keep("key", ["a"], {"default": pin(5, 2)})
    (name,) = client.keys()
    assert 8 * 60_000 < client.pttl(name) <= 10 * 60_000
    keyed.keep("key", ["a"], {"default": pin(20, 2)})
    assert 19 * 60_000 < client.pttl(name) <= 21 * 60_000


# Forgetting


def test_what_was_loaded_is_forgotten(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    keep(["a"], {"default": pin(5, 1), "users": pin(5)})
    keep(["a"], {}, {"default": fetch("a")["default"]})
    assert set(fetch("a")) == {"users"}
    keep(["a"], {}, fetch("a"))
    assert fetch("a") == {}


def test_a_newer_pin_is_not_forgotten_by_an_older_request(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    """GitLab's check-then-delete raced with a newer write."""
    keep(["a"], {"default": pin(5, 1)})
    seen = fetch("a")
    newer = {"default": pin(6, 2)}
    keep(["a"], newer)
    keep(["a"], {}, seen)
    assert fetch("a") == about(newer)


def test_a_newer_pin_of_one_pool_keeps_no_other_one(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    keep(["a"], {"default": pin(5, 1), "users": pin(5, 1)})
    seen = fetch("a")
    keep(["a"], {"default": pin(6, 2)})
    keep(["a"], {}, seen)
    assert set(fetch("a")) == {"default"}


def test_a_longer_window_alone_is_a_newer_pin(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    keep(["a"], {"default": pin(5, 1)})
    seen = fetch("a")
    keep(["a"], {"default": pin(6, 1)})
    keep(["a"], {}, seen)
    assert set(fetch("a")) == {"default"}


def test_a_merged_pin_can_be_forgotten(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    """One write without a position has the latest end, another one has the position."""
    keep(["a"], {"default": pin(5, 1)})
    keep(["a"], {"default": pin(9)})
    keep(["a"], {}, fetch("a"))
    assert fetch("a") == {}


def test_forgetting_what_is_not_there_is_no_error(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    keep(["a"], {}, {"default": pin(5, 1)})
    assert fetch("a") == {}


# Parallel writers


def in_threads(count: int, work: Callable[[int], Any]) -> None:
    together = threading.Barrier(count)

    def start(number: int) -> None:
        together.wait(30)
        work(number)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(start, range(count)))


def test_many_threads_lose_nothing_on_valkey(on_valkey: None) -> None:
    """Each moves one log of its own and one that all share, at the same instant."""
    threads, rounds = 16, 25
    until = round(time.time() + 60, 3)

    def write(number: int) -> None:
        for step in range(rounds):
            point = step * threads + number + 1
            position = {"shared": point, f"log{number}": point}
            keyed.keep("key", ["user"], {"default": Pin(until + point / 1000, 0.0, position)})

    in_threads(threads, write)
    highest = threads * rounds
    expected = {f"log{number}": highest - threads + number + 1 for number in range(threads)}
    found = keyed.fetch("key", ["user"])["default"]
    assert found.position == {"shared": highest, **expected}
    assert found.until == pytest.approx(until + highest / 1000, abs=0.002)


def test_on_valkey_no_newer_pin_is_forgotten_under_threads(on_valkey: None) -> None:
    """Half of the threads write, the others forget what they have just seen."""
    until = round(time.time() + 60, 3)
    lost: list[int] = []

    def work(number: int) -> None:
        key = f"user{number // 2}"
        for step in range(1, 60):
            if number % 2:
                keyed.keep("key", [key], {}, keyed.fetch("key", [key]))
                continue
            keyed.keep("key", [key], {"default": Pin(until + step / 1000, 0.0, {"1": step})})
            # Forgotten since, or there: but never an older one in its place.
            known = keyed.fetch("key", [key]).get("default")
            if known is not None and known.position != {"1": step}:
                lost.append(step)

    in_threads(8, work)
    assert lost == []


# The interface for async code


def test_async_code_asks_a_cache_with_async_methods_without_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hop(self: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"hopped to a thread for {self.func}")

    async def work() -> Pins:
        monkeypatch.setattr(SyncToAsync, "__call__", hop)
        try:
            await keyed.akeep("key", ["a"], {"default": pin(5, 1)})
            return await keyed.afetch("key", ["a"])
        finally:
            monkeypatch.undo()

    with pins_in({"BACKEND": "tests.caches.AsyncCache", "LOCATION": "hops"}):
        calls.clear()
        assert set(async_to_sync(work)()) == {"default"}
    assert {name for name in calls if name.startswith("a")} == {"aget", "aget_many", "aset"}


# Outages


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_cache_that_is_down_is_said_once_in_a_while(
    fetch: Callable[..., Pins],
    keep: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running() as server:
        url = server.connection_url
    with pins_in(redis_cache(url), PINNING_RETRY_AFTER=30):
        assert fetch("a") == {}
        for _ in range(3):
            keep(["a"], {"default": pin(5, 1)})
            assert fetch("a") == {}
        (line,) = lines(caplog)
        assert "'pins' is left alone for 30" in line
        later = time.monotonic() + 61
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: later)
            assert fetch("a") == {}
            assert fetch("a") == {}
        assert len(lines(caplog)) == 2


def test_a_cache_that_comes_back_is_used_again(
    fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    with running() as server:
        port = server.port
        with pins_in(redis_cache(server.connection_url), PINNING_RETRY_AFTER=0):
            keep(["a"], {"default": pin(5, 1)})
            assert set(fetch("a")) == {"default"}
            server.stop()
            assert fetch("a") == {}
            server._desired_port = port
            server.start()
            assert fetch("a") == {}, "an emptied cache"
            keep(["a"], {"default": pin(5, 1)})
            assert set(fetch("a")) == {"default"}


def test_a_cache_that_does_not_answer_is_waited_for_no_longer_than_said(
    fetch: Callable[..., Pins], keep: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Redis' own client would wait for ever: that this test ends is what it shows."""
    with silent_server() as url, pins_in(redis_cache(url), PINNING_RETRY_AFTER=30):
        client = keyed._redis(caches["pins"])
        bounds = client.connection_pool.connection_kwargs
        assert bounds["socket_timeout"] == bounds["socket_connect_timeout"] == keyed.LONGEST
        assert fetch("a") == {}
        keep(["a"], {"default": pin(5, 1)})
        assert len(lines(caplog)) == 1


def test_a_site_may_choose_another_bound(valkey: str) -> None:
    with pins_in(redis_cache(valkey, socket_timeout=0.1)):
        kwargs = keyed._redis(caches["pins"]).connection_pool.connection_kwargs
        assert (kwargs["socket_timeout"], kwargs["socket_connect_timeout"]) == (0.1, keyed.LONGEST)


def test_a_pool_of_its_own_kind_is_used_as_it_is(valkey: str) -> None:
    with pins_in(redis_cache(valkey, pool_class="tests.caches.NamedPool", service="main")):
        keyed.keep("key", ["named"], {"default": pin(5, 1)})
        assert set(keyed.fetch("key", ["named"])) == {"default"}


def test_any_other_cache_that_is_slow_is_left_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(keyed, "LONGEST", 0.5)
    with pins_in({**LOCMEM, "LOCATION": "slow"}):
        monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
        keyed.keep("key", ["a"], {"default": pin(5, 1)})
        assert set(keyed.fetch("key", ["a"])) == {"default"}
        assert keyed.fetch("key", ["a"]) == {}
        monkeypatch.undo()
    (line,) = lines(caplog)
    assert "longer than 0.5 s" in line


def test_memcached_that_is_down_is_left_alone(
    fetch: Callable[..., Pins], keep: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Its client says so once by the system's error, and then by one of its own."""
    pytest.importorskip("pymemcache")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    entry = {
        "BACKEND": "django.core.cache.backends.memcached.PyMemcacheCache",
        "LOCATION": address,
        "OPTIONS": {"timeout": 0.5, "connect_timeout": 0.5, "retry_attempts": 0},
    }
    with pins_in(entry, PINNING_RETRY_AFTER=0):
        for _ in range(3):
            keep(["a"], {"default": pin(5, 1)})
            assert fetch("a") == {}
    assert all("left alone" in line for line in lines(caplog))


def test_a_server_that_became_a_replica_is_left_alone(
    fetch: Callable[..., Pins], keep: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """So it is after a failover that the site's address has not followed yet."""
    with running() as server, pins_in(redis_cache(server.connection_url), PINNING_RETRY_AFTER=30):
        keep(["a"], {"default": pin(5, 1)})
        keyed._redis(caches["pins"]).execute_command("REPLICAOF", "127.0.0.1", "1")
        for _ in range(3):
            keep(["a"], {"default": pin(5, 1)})
        assert fetch("a") == {}
    (line,) = lines(caplog)
    assert "left alone" in line


def test_a_fault_that_is_no_outage_leaves_the_cache_in_use(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    keep(["b"], {"default": pin(5, 1)})
    cache.set(keyed._names("key", ["a"])[0], "nonsense")
    fetch("a")
    assert set(fetch("b")) == {"default"}


def test_a_users_key_is_no_things_key(cache: BaseCache) -> None:
    keyed.keep("user", ["7"], {"default": pin(5, 1)})
    assert keyed.fetch("key", ["7"]) == keyed.fetch("task", ["7"]) == {}
    assert set(keyed.fetch("user", ["7"])) == {"default"}


@pytest.mark.parametrize(
    ("key", "error", "says"),
    [
        (42, TypeError, r"str\(42\)"),
        (None, TypeError, "text"),
        (b"a", TypeError, "text"),
        ("", ValueError, "empty"),
        ("order:\ud800", ValueError, "UTF-8"),
    ],
)
def test_what_is_no_key_is_said_and_costs_nobody_the_cache(
    cache: BaseCache,
    fetch: Callable[..., Pins],
    keep: Callable[..., None],
    key: Any,
    error: type[Exception],
    says: str,
) -> None:
    keep(["a"], {"default": pin(5, 1)})
    with pytest.raises(error, match=says):
        fetch(key)
    with pytest.raises(error, match=says):
        keep([key], {"default": pin(5, 1)})
    assert set(fetch("a")) == {"default"}


def test_what_somebody_else_put_there_is_no_error(
    cache: BaseCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.set(keyed._names("key", ["a"])[0], "nonsense")
    assert keyed.fetch("key", ["a"]) == {}
    assert len(lines(caplog)) == 1


def test_settings_that_change_are_followed(valkey: str) -> None:
    with pins_in(redis_cache(valkey)):
        keyed.keep("key", ["moved"], {"default": pin(5, 1)})
        with override_settings(PINNING_CACHE="default"):
            assert keyed.fetch("key", ["moved"]) == {}
        assert set(keyed.fetch("key", ["moved"])) == {"default"}
