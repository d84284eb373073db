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
from asgiref.sync import async_to_sync, sync_to_async
from django.core.cache import caches
from django.core.cache.backends.base import BaseCache
from django.test import override_settings
from freezegun.api import FrozenDateTimeFactory
from redis import Redis
from redis.exceptions import ResponseError

from pinning_middleware.checks.servers import check_evictions
from pinning_middleware.pins import Pin, PinKey, Pins, Position, merge_pins
from pinning_middleware.stores import cache as keyed
from pinning_middleware.stores import circuit_breaker
from pinning_middleware.stores.redis_pins import _with_timeouts, redis_pins
from pinning_middleware.utils import counters
from tests.valkey import LOCMEM, on_valkey, pins_in, redis_cache, running, valkey

__all__ = ["on_valkey", "valkey"]

DEFAULT, USERS = PinKey("default"), PinKey("users")
FETCHES: dict[str, Callable[[list[str]], dict[PinKey, Pin]]] = {
    "sync": keyed.load_pins,
    "async": async_to_sync(sync_to_async(keyed.load_pins)),
}
KEEPS: dict[str, Callable[..., None]] = {
    "sync": keyed.save_pins,
    "async": async_to_sync(sync_to_async(keyed.save_pins)),
}


@pytest.fixture(params=["locmem", "valkey"])
def cache(request: pytest.FixtureRequest) -> Iterator[BaseCache]:
    """Each kind of cache, empty."""
    if request.param == "valkey":
        entry = redis_cache(request.getfixturevalue("valkey"))
    else:
        entry = {**LOCMEM, "LOCATION": "pins"}
    with pins_in(entry):
        caches["pins"].clear()
        yield caches["pins"]


@pytest.fixture(params=["sync", "async"])
def fetch(request: pytest.FixtureRequest) -> Callable[..., dict[PinKey, Pin]]:
    return lambda *keys: FETCHES[request.param]("key", list(keys))


@pytest.fixture(params=["sync", "async"])
def keep(request: pytest.FixtureRequest) -> Callable[..., None]:
    return functools.partial(KEEPS[request.param], "key")


def client_of_pins() -> Any:
    pins = redis_pins()
    assert pins is not None
    return pins.client


def pin(minutes: float = 15, point: int | None = None, log: str = "1") -> Pin:
    """A pin in whole milliseconds, as all caches keep it; of minutes, for busy machines."""
    return Pin(_in(minutes), None, None if point is None else Position({log: point}))


def _in(minutes: float) -> float:
    return round(time.time() + 60 * minutes, 3)


def about(pins: Pins) -> Any:
    return {
        key: (_near(p.until), _near(max(0.0, p.primary_only_end)), p.position)
        for key, p in pins.items()
    }


def _near(moment: float) -> Any:
    return pytest.approx(moment, abs=0.002)


def parts(pins: Pins) -> Any:
    """Return what ``about()`` compares: merging may change the representation of a pin."""
    return {key: (p.until, max(0.0, p.primary_only_end), p.position) for key, p in pins.items()}


def test_unknown_key_has_no_pins(cache: BaseCache, fetch: Callable[..., Pins]) -> None:
    assert fetch("a") == {}
    assert fetch("a", "b") == {}
    assert fetch() == {}


def test_pins_of_several_keys_are_merged(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    one, other = {DEFAULT: pin(5, 10)}, {DEFAULT: pin(9, 3), USERS: pin(2)}
    keep(["a"], one)
    keep(["b"], other)
    assert parts(fetch("a")) == about(one)
    assert parts(fetch("b", "c")) == about(other)
    assert parts(fetch("a", "b")) == about(merge_pins(one, other))


def test_one_call_saves_many_keys(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    pins = {DEFAULT: pin(5, 10)}
    names = [f"order:{number}" for number in range(50)]
    keep(names, pins)
    assert all(parts(fetch(name)) == about(pins) for name in names)
    assert parts(fetch(*names)) == about(pins)


def test_no_pins_are_loaded_while_the_package_is_disabled(cache: BaseCache) -> None:
    keyed.save_pins("key", ["a"], {DEFAULT: pin(5, 1)})
    with override_settings(PINNING_ENABLED=False):
        assert keyed.load_pins("key", ["a"]) == {}
    assert set(keyed.load_pins("key", ["a"])) == {DEFAULT}


@pytest.mark.parametrize("key", ["x" * 300, "with blanks\n", "ä€😀", "a|b"])
def test_any_text_is_a_valid_key(cache: BaseCache, key: str) -> None:
    """Including keys that memcached refuses and Django warns of."""
    keyed.save_pins("key", [key], {DEFAULT: pin(5, 1)})
    assert set(keyed.load_pins("key", [key])) == {DEFAULT}


def test_merge_keeps_newest_position_and_latest_end(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    newer, older = pin(5, 2**60 + 1), pin(9, 2**60)
    for first, second in ((newer, older), (older, newer)):
        cache.clear()
        keep(["a"], {DEFAULT: first})
        keep(["a"], {DEFAULT: second})
        assert parts(fetch("a")) == about(
            {DEFAULT: Pin(older.until, None, Position({"1": 2**60 + 1}))}
        )


def test_positions_are_compared_as_numbers(cache: BaseCache, fetch: Callable[..., Pins]) -> None:
    keyed.save_pins("key", ["a"], {DEFAULT: pin(5, 9)})
    keyed.save_pins("key", ["a"], {DEFAULT: pin(5, 10)})
    assert fetch("a")[DEFAULT].position == Position({"1": 10})
    keyed.save_pins("key", ["a"], {DEFAULT: pin(5, 9)})
    assert fetch("a")[DEFAULT].position == Position({"1": 10})


def test_pin_without_position_delays_the_position_of_another(cache: BaseCache) -> None:
    held, told = pin(5), pin(9, 7)
    keyed.save_pins("key", ["a"], {DEFAULT: held})
    keyed.save_pins("key", ["a"], {DEFAULT: told})
    assert parts(keyed.load_pins("key", ["a"])) == about(
        {DEFAULT: Pin(told.until, held.until, Position({"1": 7}))}
    )


def test_pin_with_an_end_only_delays_the_position_of_another(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    """As in a token without room for positions."""
    alone, told = Pin(_in(9)), pin(5, 7)
    keep(["a"], {DEFAULT: alone})
    keep(["a"], {DEFAULT: told})
    assert fetch("a")[DEFAULT].is_primary_only(time.time())


def test_log_of_a_former_primary_ends_with_its_window(
    cache: BaseCache, fetch: Callable[..., Pins], clock: FrozenDateTimeFactory
) -> None:
    """No replica follows it any more: until then, reads go to the primary."""
    keyed.save_pins("key", ["a"], {DEFAULT: pin(5, 9, log="1")})
    clock.tick(1 * 60)
    keyed.save_pins("key", ["a"], {DEFAULT: pin(9, 3, log="2")})
    found = fetch("a")[DEFAULT]
    assert found.position is not None
    assert found.is_primary_only(time.time()) or "1" in found.position.points
    clock.tick(6 * 60)
    found = fetch("a")[DEFAULT]
    assert not found.is_primary_only(time.time())
    assert found.position == Position({"2": 3})


def test_later_writes_do_not_extend_the_window_of_a_former_primary(
    cache: BaseCache,
    fetch: Callable[..., Pins],
    keep: Callable[..., None],
    clock: FrozenDateTimeFactory,
) -> None:
    keep(["a"], {DEFAULT: pin(5, 9, log="1")})
    for offset in (3, 4):
        clock.tick(1 * 60)
        # Each request saves what it loaded, too.
        keep(["a"], merge_pins(fetch("a"), {DEFAULT: pin(9, offset, log="2")}))
    assert fetch("a")[DEFAULT].is_primary_only(time.time())
    clock.tick(4 * 60)
    found = fetch("a")[DEFAULT]
    assert not found.is_primary_only(time.time())
    assert found.position == Position({"2": 4})


def test_position_is_loaded_where_the_clock_is_ahead(
    on_valkey: None, fetch: Callable[..., Pins], clock: FrozenDateTimeFactory
) -> None:
    """By more than the window; the server of the cache measures that by its own clock."""
    keyed.save_pins("key", ["a"], {DEFAULT: pin(5, 9)})
    clock.tick(10 * 60)
    found = fetch("a")[DEFAULT]
    assert found.position == Position({"1": 9})
    assert not found.is_primary_only(time.time())


def test_expired_pin_without_position_is_not_loaded(
    cache: BaseCache, fetch: Callable[..., Pins], clock: FrozenDateTimeFactory
) -> None:
    keyed.save_pins("key", ["a"], {DEFAULT: pin(5), USERS: pin(9)})
    clock.tick(6 * 60)
    assert set(fetch("a")) == {USERS}
    clock.tick(6 * 60)
    assert fetch("a") == {}


def test_expired_pin_without_position_is_not_saved(
    cache: BaseCache, keep: Callable[..., None]
) -> None:
    keep(["a"], {DEFAULT: pin(-1)})
    assert keyed.load_pins("key", ["a"]) == {}


def test_expired_pin_with_position_is_not_saved(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    keep(["a"], {DEFAULT: pin(-1, 1), USERS: pin(5)})
    assert set(fetch("a")) == {USERS}


def test_key_of_pins_without_position_expires_in_the_cache_with_its_window(
    on_valkey: None,
) -> None:
    client = client_of_pins()
    keyed.save_pins("key", ["a"], {DEFAULT: pin(9)})
    keyed.save_pins("key", ["a"], {DEFAULT: pin(5)})
    (name,) = client.keys()
    assert 8 * 60_000 < client.pttl(name) <= 10 * 60_000
    keyed.save_pins("key", ["a"], {DEFAULT: pin(20)})
    assert 19 * 60_000 < client.pttl(name) <= 21 * 60_000


@pytest.mark.parametrize("offset", [None, 1])
def test_key_expires_in_the_cache_with_its_window(on_valkey: None, offset: int | None) -> None:
    keyed.save_pins("key", ["a"], {DEFAULT: pin(-1, offset)})
    client = client_of_pins()
    assert client.keys() == []
    keyed.save_pins("key", ["a"], {DEFAULT: pin(9, offset)})
    (name,) = client.keys()
    assert 8 * 60_000 < client.pttl(name) <= 10 * 60_000


def test_optional_logs_are_loaded_as_saved(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    position = Position({"0-1": 8, "5-1": 3}, frozenset({"5-1"}))
    pins = {DEFAULT: Pin(_in(5), None, position)}
    keep(["a"], pins)
    assert parts(fetch("a")) == about(pins)
    required = {DEFAULT: Pin(_in(5), None, Position({"0-1": 8, "5-1": 2}))}
    keep(["a"], required)
    assert fetch("a")[DEFAULT].position == Position({"0-1": 8, "5-1": 3})
    keep(["a"], pins)
    assert fetch("a")[DEFAULT].position == Position({"0-1": 8, "5-1": 3})


# Forgetting


def test_forget_removes_loaded_pins(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    keep(["a"], {DEFAULT: pin(5, 1), USERS: pin(5)})
    keep(["a"], {}, {DEFAULT: fetch("a")[DEFAULT]})
    assert set(fetch("a")) == {USERS}
    keep(["a"], {}, fetch("a"))
    assert fetch("a") == {}


def test_forget_keeps_a_newer_pin(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    """Regression test: check-then-delete races with a newer write."""
    keep(["a"], {DEFAULT: pin(5, 1)})
    seen = fetch("a")
    newer = {DEFAULT: pin(6, 2)}
    keep(["a"], newer)
    keep(["a"], {}, seen)
    assert parts(fetch("a")) == about(newer)


def test_forget_removes_pins_of_other_pools_beside_a_newer_one(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    keep(["a"], {DEFAULT: pin(5, 1), USERS: pin(5, 1)})
    seen = fetch("a")
    keep(["a"], {DEFAULT: pin(6, 2)})
    keep(["a"], {}, seen)
    assert set(fetch("a")) == {DEFAULT}


def test_forget_keeps_a_pin_with_a_later_end(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    keep(["a"], {DEFAULT: pin(5, 1)})
    seen = fetch("a")
    keep(["a"], {DEFAULT: pin(6, 1)})
    keep(["a"], {}, seen)
    assert set(fetch("a")) == {DEFAULT}


def test_forget_removes_a_merged_pin(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    """One write has the latest end, another one the position."""
    keep(["a"], {DEFAULT: pin(5, 1)})
    keep(["a"], {DEFAULT: pin(9)})
    keep(["a"], {}, fetch("a"))
    assert fetch("a") == {}


def test_forget_of_an_unknown_pin_does_nothing(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    keep(["a"], {}, {DEFAULT: pin(5, 1)})
    assert fetch("a") == {}


# Parallel writers


def in_threads(count: int, work: Callable[[int], Any]) -> None:
    together = threading.Barrier(count)

    def start(number: int) -> None:
        together.wait(30)
        work(number)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(start, range(count)))


def test_parallel_saves_on_valkey_lose_no_position(on_valkey: None) -> None:
    """Each thread advances a log of its own and a shared one."""
    threads, rounds = 16, 25
    until = round(time.time() + 60, 3)

    def write(number: int) -> None:
        for step in range(rounds):
            point = step * threads + number + 1
            position = {"shared": point, f"log{number}": point}
            keyed.save_pins("key", ["user"], {DEFAULT: Pin(until, None, Position(position))})

    in_threads(threads, write)
    highest = threads * rounds
    expected = {f"log{number}": highest - threads + number + 1 for number in range(threads)}
    found = keyed.load_pins("key", ["user"])[DEFAULT]
    assert found.position == Position({"shared": highest, **expected})
    assert found.until == pytest.approx(until, abs=0.002)


def test_parallel_forgets_on_valkey_keep_newer_pins(on_valkey: None) -> None:
    """Half of the threads save, the others forget what they have loaded."""
    until = round(time.time() + 60, 3)
    lost: list[int] = []

    def work(number: int) -> None:
        key = f"user{number // 2}"
        for step in range(1, 60):
            if number % 2:
                keyed.save_pins("key", [key], {}, keyed.load_pins("key", [key]))
                continue
            keyed.save_pins(
                "key", [key], {DEFAULT: Pin(until + step / 1000, None, Position({"1": step}))}
            )
            # Forgotten meanwhile or present, but never replaced by an older one.
            known = keyed.load_pins("key", [key]).get(DEFAULT)
            if known is not None and known.position != Position({"1": step}):
                lost.append(step)

    in_threads(8, work)
    assert lost == []


# Outages


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never replies."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_unavailable_cache_is_logged_once_a_minute(
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
            keep(["a"], {DEFAULT: pin(5, 1)})
            assert fetch("a") == {}
        (line,) = lines(caplog)
        assert "'pins' is unavailable and will not be used for 30.0 seconds" in line
        later = time.monotonic() + 61
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: later)
            assert fetch("a") == {}
            assert fetch("a") == {}
        assert len(lines(caplog)) == 2


def test_cache_is_used_again_after_retry_after(
    fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    with running() as server:
        port = server.port
        with pins_in(redis_cache(server.connection_url), PINNING_RETRY_AFTER=0):
            keep(["a"], {DEFAULT: pin(5, 1)})
            assert set(fetch("a")) == {DEFAULT}
            server.stop()
            assert fetch("a") == {}
            server._desired_port = port
            server.start()
            assert fetch("a") == {}, "an emptied cache"
            keep(["a"], {DEFAULT: pin(5, 1)})
            assert set(fetch("a")) == {DEFAULT}


def test_unresponsive_cache_is_bounded_by_the_timeout(
    fetch: Callable[..., Pins], keep: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a timeout the client would wait forever."""
    with silent_server() as url, pins_in(redis_cache(url), PINNING_RETRY_AFTER=30):
        bounds = client_of_pins().connection_pool.connection_kwargs
        assert (
            bounds["socket_timeout"] == bounds["socket_connect_timeout"] == circuit_breaker.TIMEOUT
        )
        assert fetch("a") == {}
        keep(["a"], {DEFAULT: pin(5, 1)})
        assert len(lines(caplog)) == 1


def test_timeouts_of_the_site_are_kept(valkey: str) -> None:
    with pins_in(redis_cache(valkey, socket_timeout=0.1)):
        kwargs = client_of_pins().connection_pool.connection_kwargs
        assert (kwargs["socket_timeout"], kwargs["socket_connect_timeout"]) == (
            0.1,
            circuit_breaker.TIMEOUT,
        )


def test_connection_pool_with_another_constructor_is_used_unchanged(valkey: str) -> None:
    with pins_in(redis_cache(valkey, pool_class="tests.caches.NamedPool", service="main")):
        keyed.save_pins("key", ["named"], {DEFAULT: pin(5, 1)})
        assert set(keyed.load_pins("key", ["named"])) == {DEFAULT}


def test_slow_cache_is_not_loaded_from(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(circuit_breaker, "TIMEOUT", 0.5)
    with pins_in({**LOCMEM, "LOCATION": "slow"}):
        monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
        keyed.save_pins("key", ["a"], {DEFAULT: pin(5, 1)})
        assert set(keyed.load_pins("key", ["a"])) == {DEFAULT}
        assert keyed.load_pins("key", ["a"]) == {}
        monkeypatch.undo()
    (line,) = lines(caplog)
    assert "longer than 0.5 s" in line


def test_unavailable_memcached_is_not_used(
    fetch: Callable[..., Pins], keep: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Its client raises an OSError first, then an error of its own."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    entry = {
        "BACKEND": "django.core.cache.backends.memcached.PyMemcacheCache",
        "LOCATION": address,
        "OPTIONS": {"timeout": 0.5, "connect_timeout": 0.5, "retry_attempts": 0},
    }
    with pins_in(entry, PINNING_RETRY_AFTER=0):
        for _ in range(3):
            keep(["a"], {DEFAULT: pin(5, 1)})
            assert fetch("a") == {}
    assert all("is unavailable" in line for line in lines(caplog))


def test_read_only_server_is_not_used(
    fetch: Callable[..., Pins], keep: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """As after a failover, until the address of the site follows."""
    with running() as server, pins_in(redis_cache(server.connection_url), PINNING_RETRY_AFTER=30):
        keep(["a"], {DEFAULT: pin(5, 1)})
        client_of_pins().execute_command("REPLICAOF", "127.0.0.1", "1")
        for _ in range(3):
            keep(["a"], {DEFAULT: pin(5, 1)})
        assert fetch("a") == {}
    (line,) = lines(caplog)
    assert "is unavailable" in line


def test_invalid_value_does_not_disable_the_cache(
    cache: BaseCache, fetch: Callable[..., Pins], keep: Callable[..., None]
) -> None:
    keep(["b"], {DEFAULT: pin(5, 1)})
    cache.set(keyed._names("key", ["a"])[0], "nonsense")
    fetch("a")
    assert set(fetch("b")) == {DEFAULT}


def test_namespaces_of_keys_are_separate(cache: BaseCache) -> None:
    keyed.save_pins("user", ["7"], {DEFAULT: pin(5, 1)})
    assert keyed.load_pins("key", ["7"]) == keyed.load_pins("task", ["7"]) == {}
    assert set(keyed.load_pins("user", ["7"])) == {DEFAULT}


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
def test_invalid_key_raises_and_does_not_disable_the_cache(
    cache: BaseCache,
    fetch: Callable[..., Pins],
    keep: Callable[..., None],
    key: Any,
    error: type[Exception],
    says: str,
) -> None:
    keep(["a"], {DEFAULT: pin(5, 1)})
    with pytest.raises(error, match=says):
        fetch(key)
    with pytest.raises(error, match=says):
        keep([key], {DEFAULT: pin(5, 1)})
    assert set(fetch("a")) == {DEFAULT}


def test_invalid_value_is_logged(cache: BaseCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.set(keyed._names("key", ["a"])[0], "nonsense")
    assert keyed.load_pins("key", ["a"]) == {}
    assert len(lines(caplog)) == 1


def test_change_of_settings_is_applied(valkey: str) -> None:
    with pins_in(redis_cache(valkey)):
        keyed.save_pins("key", ["moved"], {DEFAULT: pin(5, 1)})
        with override_settings(PINNING_CACHE="default"):
            assert keyed.load_pins("key", ["moved"]) == {}
        assert set(keyed.load_pins("key", ["moved"])) == {DEFAULT}


# Servers that refuse scripts


@pytest.fixture(params=["acl", "unknown command"])
def without_scripts(request: pytest.FixtureRequest, valkey: str) -> Iterator[None]:
    """A server on which no script may be run."""
    if request.param == "acl":
        with running() as server:
            admin = Redis.from_url(server.connection_url)
            admin.execute_command("ACL", "SETUSER", "app", "on", ">x", "~*", "+@all", "-@scripting")
            with pins_in(redis_cache(server.connection_url.replace("//", "//app:x@"))):
                yield
    else:
        with pins_in(redis_cache(valkey)):
            caches["pins"].clear()
            client_of_pins().eval = refuse
            yield


def refuse(*args: Any) -> None:
    raise ResponseError("unknown command 'EVAL', with args beginning with: ...")


def test_pins_are_merged_without_scripts(
    without_scripts: None,
    fetch: Callable[..., Pins],
    keep: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    newer, older = pin(5, 2**60 + 1), pin(9, 2**60)
    keep(["a"], {DEFAULT: newer})
    keep(["a"], {DEFAULT: older, USERS: pin(5, 1)})
    merged = Pin(older.until, None, Position({"1": 2**60 + 1}))
    assert parts(fetch("a"))[DEFAULT] == about({DEFAULT: merged})[DEFAULT]
    loaded = fetch("a")
    keep(["a"], {DEFAULT: pin(20, 2**61)})
    keep(["a"], {}, loaded)
    assert set(fetch("a")) == {DEFAULT}, "the newer pin stays"
    (name,) = client_of_pins().keys()
    assert 19 * 60_000 < client_of_pins().pttl(name) <= 21 * 60_000
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "does not run scripts" in record.getMessage()


def test_pin_that_a_full_server_refuses_is_counted(keep: Callable[..., None]) -> None:
    with running() as server:
        admin = Redis.from_url(server.connection_url)
        admin.config_set("maxmemory-policy", "noeviction")
        with pins_in(redis_cache(server.connection_url)):
            before = counters.pin_events["lost"]
            keep(["a"], {DEFAULT: pin(5, 1)})
            assert counters.pin_events["lost"] == before
            admin.config_set("maxmemory", 1)
            keep(["a"], {DEFAULT: pin(5, 2)})
            assert counters.pin_events["lost"] == before + 1


def test_live_check_reports_a_server_that_has_evicted_keys() -> None:
    with running() as server:
        admin = Redis.from_url(server.connection_url)
        stores = ["pinning_middleware.stores.CacheStore"]
        with pins_in(redis_cache(server.connection_url), PINNING_STORES=stores):
            assert check_evictions() == []
            admin.config_set("maxmemory-policy", "allkeys-lru")
            for number in range(100):
                admin.set(f"key{number}", "x" * 10_000)
            admin.config_set("maxmemory", admin.info("memory")["used_memory"] - 100_000)
            (message,) = check_evictions()
            assert (message.id, "'pins' has evicted" in message.msg) == (
                "pinning_middleware.W034",
                True,
            )
            with override_settings(PINNING_STORES=[]):
                assert check_evictions() == []


def test_client_that_decodes_responses(valkey: str) -> None:
    with pins_in(redis_cache(valkey, decode_responses=True)):
        keyed.save_pins("key", ["decoded"], {DEFAULT: pin(5, 1)})
        assert set(keyed.load_pins("key", ["decoded"])) == {DEFAULT}


def test_client_without_a_connection_pool_is_used_unchanged(
    valkey: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of a cluster has a pool for each node."""
    with pins_in(redis_cache(valkey)):
        client = caches["pins"]._cache.get_client(write=True)
        del client.connection_pool
        assert _with_timeouts(client) is client


def test_save_to_a_slow_cache_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(circuit_breaker, "TIMEOUT", 0.5)
    with pins_in({**LOCMEM, "LOCATION": "slow-save"}, PINNING_RETRY_AFTER=30):
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: float(next(ticks)))
            keyed.load_pins("key", ["a"])
            keyed.load_pins("key", ["a"])
            assert not keyed.breaker.allows_loads
            keyed.save_pins("key", ["a"], {DEFAULT: pin(5, 1)})
        keyed.breaker.reset()
        assert set(keyed.load_pins("key", ["a"])) == {DEFAULT}
