"""State of a scope: the end of writes, the pins that apply, and late saves."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from contextlib import ExitStack
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections, transaction
from django.test import Client, RequestFactory, override_settings
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import (
    is_pinned,
    pin_keys,
    pin_this_request,
    pinning_scope,
    propagate_scope,
    use_primary,
)
from pinning_middleware.middleware import PinningMiddleware
from pinning_middleware.pins import PinKey, PoolKey, Position
from pinning_middleware.routing.outgoing import outgoing_pins
from pinning_middleware.routing.policy import to_inherited_pin
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.scope import current_scope, enter, entered_scope
from pinning_middleware.stores import cache
from tests.app import stores
from tests.app.models import Book
from tests.conftest import Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


def write() -> None:
    Book.objects.create(title="x")


# When a write ended


def test_write_longer_than_the_window_pins(
    clock: FrozenDateTimeFactory,
) -> None:
    def slow(execute: Any, *args: Any) -> Any:
        clock.tick(60)
        return execute(*args)

    with pinning_scope() as scope, connections["default"].execute_wrapper(slow):
        write()
        assert is_pinned()
    assert scope.token is not None
    (pin,) = scope.pins.values()
    assert pin.until == pytest.approx(time.time() + 15, abs=0.1)


def test_write_in_a_transaction_ends_at_the_commit(clock: FrozenDateTimeFactory) -> None:
    with pinning_scope() as scope:
        with transaction.atomic():
            write()
            clock.tick(60)
            assert where() == "default"
        (pin,) = scope.pins.values()
        assert pin.until == pytest.approx(time.time() + 15, abs=0.1)


def test_open_write_of_another_thread_keeps_the_pin() -> None:
    """A position covers only writes that had ended when it was read, on any thread."""
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with transaction.atomic():
            write()
            begun.set()
            go_on.wait(20)
        connections.close_all()

    with pinning_scope() as scope:
        thread = threading.Thread(target=propagate_scope(work))
        thread.start()
        assert begun.wait(20)
        assert current_scope().state(PoolKey("default")).has_open_write
        go_on.set()
        thread.join()
        assert not current_scope().state(PoolKey("default")).has_open_write
    assert scope.token


def test_scope_keeps_no_connection_of_a_thread_that_has_written_and_ended() -> None:
    found: list[weakref.ref[Any]] = []

    def work() -> None:
        write()
        found.append(weakref.ref(connections["default"]))

    with pinning_scope(isolated=True) as scope:
        for _ in range(3):
            thread = threading.Thread(target=propagate_scope(work))
            thread.start()
            thread.join()
        gc.collect()
        assert [reference() for reference in found] == [None] * 3
    assert scope.token is not None


def test_long_scope_reads_replicas_after_the_window(clock: FrozenDateTimeFactory) -> None:
    """For example an event stream, a socket, or a long task."""
    with pinning_scope() as scope:
        write()
        clock.tick(14)
        assert where() == "default"
        clock.tick(2)
        assert is_replica(where())
        assert not is_pinned()
    assert scope.token is None


def test_event_loop_outside_a_scope_reads_replicas_after_the_window(
    clock: FrozenDateTimeFactory,
) -> None:
    async def loop() -> tuple[str, str]:
        await Book.objects.acreate(title="x")
        before = await sync_to_async(where)()
        clock.tick(16)
        return before, where()

    before, after = async_to_sync(loop)()
    assert before == "default"
    assert is_replica(after)


# Outside any scope


def test_context_outside_a_scope_uses_one_replica_for_a_window(
    clock: FrozenDateTimeFactory,
) -> None:
    """A command must not alternate between replicas with different lag."""
    first = where()
    assert {where() for _ in range(5)} == {first}
    clock.tick(16)
    second = where()
    assert second != first
    assert {where() for _ in range(5)} == {second}


# Work after the end of the request


@override_settings(PINNING_STORES=["tests.app.stores.RecordingStore"])
def test_write_of_a_thread_after_its_request_is_saved() -> None:
    """Stores that need no response save it."""
    go_on, threads = threading.Event(), []

    def late() -> None:
        go_on.wait(20)
        write()
        connections.close_all()

    def view(request: Any) -> Any:
        from django.http import HttpResponse

        threads.append(threading.Thread(target=propagate_scope(late)))
        threads[0].start()
        return HttpResponse()

    stores.kept.clear()
    PinningMiddleware(view)(RequestFactory().get("/"))
    assert stores.kept == []
    go_on.set()
    threads[0].join()
    ((response, pins),) = stores.kept
    assert response is None
    assert set(pins) == {PinKey("default")}


def test_asyncio_task_started_by_a_post_returns_to_replicas() -> None:
    kept: list[contextvars.Context] = []

    def view(request: Any) -> Any:
        from django.http import HttpResponse

        assert where() == "default"
        kept.append(contextvars.copy_context())
        return HttpResponse()

    PinningMiddleware(view)(RequestFactory().post("/"))
    assert is_replica(kept[0].run(where))


@override_settings(PINNING_STORES=["tests.app.stores.RecordingStore"])
def test_disconnected_client_keeps_the_pin() -> None:
    """ASGI: the request is cancelled, and again while its pins are saved."""
    stores.kept.clear()

    async def main() -> None:
        written, never = asyncio.Event(), asyncio.Event()

        async def view(request: Any) -> Any:
            await Book.objects.acreate(title="x")
            written.set()
            await never.wait()

        request = RequestFactory().get("/")
        task = asyncio.ensure_future(PinningMiddleware(view)(request))
        await written.wait()
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(1000):
            if stores.kept:
                break
            await asyncio.sleep(0.005)

    async_to_sync(main)()
    ((_, pins),) = stores.kept
    assert set(pins) == {PinKey("default")}


# Errors


class Interrupting:
    after_authentication = False

    def load(self, request: Any) -> dict[str, Any]:
        return {}

    def save(self, *args: Any) -> None:
        raise KeyboardInterrupt


def test_interrupted_store_closes_the_scope() -> None:
    def view(request: Any) -> Any:
        from django.http import HttpResponse

        write()
        return HttpResponse()

    with (
        override_settings(PINNING_STORES=[f"{__name__}.Interrupting"]),
        pytest.raises(KeyboardInterrupt),
    ):
        PinningMiddleware(view)(RequestFactory().get("/"))
    assert entered_scope() is None


def test_error_while_saving_keys_closes_the_scope(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(cache, "save_pins", fail)

    async def work() -> None:
        async with pinning_scope(isolated=True):
            await Book.objects.acreate(title="x")
            pin_keys("order:42")

    def sync_work() -> None:
        with pinning_scope(isolated=True):
            write()
            pin_keys("order:42")

    with pytest.raises(TimeoutError):
        sync_work()
    assert entered_scope() is None
    with pytest.raises(TimeoutError):
        async_to_sync(work)()
    assert entered_scope() is None


@override_settings(
    PINNING_REPLICAS={"default": ["replica1"], "users": ["users_replica"]},
)
def test_key_of_two_pools_is_pinned_in_both() -> None:
    with pinning_scope(isolated=True):
        write()
        pin_keys("order:42", using="default")
        pin_keys("order:42", using="users")
    assert set(cache.load_pins("key", ["order:42"])) == {PinKey("default"), PinKey("users")}


@pytest.mark.parametrize("key", ["order:\ud800", "", 42, None])
def test_invalid_key_raises(key: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="key must"):
        pin_keys(key)


# Nesting and settings


def test_nested_request_shares_writes_with_the_outer_request(visit: Visit, do: Any) -> None:
    inner = f"/sync/{do(lambda request: (is_pinned(), write())[0])}/"

    def outer(request: Any) -> tuple[bytes, bytes, str]:
        first = Client().get(inner).content
        return first, Client().get(inner).content, where()

    assert visit(outer) == (b"False", b"True", "default")


def test_request_does_not_inherit_writes_of_the_test(visit: Visit) -> None:
    write()
    assert where() == "default"
    assert is_replica(visit())


def test_changed_settings_inside_a_scope_apply_at_once() -> None:
    with pinning_scope():
        assert is_replica(where())
        with override_settings(PINNING_ENABLED=False):
            assert where() == "default"
        with override_settings(PINNING_REPLICAS=["elsewhere"]):
            assert where() == "elsewhere"
        assert is_replica(where())


def test_pools_are_created_once_by_concurrent_threads() -> None:
    made: set[int] = set()
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(20)
        made.add(id(pools()))

    with override_settings(PINNING_REPLICAS=["replica1"]):
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made == {id(pools())}


def test_propagate_scope_wraps_a_coroutine_function(visit: Visit) -> None:
    async def work() -> str:
        await Book.objects.acreate(title="x")
        return await sync_to_async(where)()

    with pinning_scope() as scope, use_primary():
        carried = propagate_scope(work)
    enter(None)
    assert async_to_sync(carried)() == "default"
    assert entered_scope() is None
    assert scope.token


def test_unpinning_compares_pins_by_value() -> None:
    with pinning_scope(isolated=True) as scope:
        pin_this_request()
    with pinning_scope(scope.token, isolated=True) as later:
        assert is_pinned()
        assert outgoing_pins(current_scope()) == later.pins


@pytest.mark.parametrize("is_open", [True, False], ids=["outer write is open", "outer has ended"])
def test_inner_scope_that_ends_late_keeps_the_later_write_of_its_outer_scope(
    clock: FrozenDateTimeFactory, is_open: bool
) -> None:
    """As a child task whose scope ends after a write of the view."""
    with ExitStack() as stack:
        outer = stack.enter_context(pinning_scope(isolated=True))
        inner = pinning_scope()
        with inner:
            write()
            clock.tick(14)
            # The view goes on meanwhile.
            enter(outer._scope)
            if is_open:
                stack.enter_context(transaction.atomic())
            write()
            enter(inner._scope)
        state = outer._scope.state(PoolKey("default"))
        assert state.has_open_write == is_open
        clock.tick(2)
        assert where() == "default"


def test_pin_that_is_set_while_an_expired_one_is_replaced_is_kept(
    clock: FrozenDateTimeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pools().by_primary["default"]

    def pin_meanwhile() -> Position:
        pin_this_request("default", 60)
        return Position({"log": 1})

    with pinning_scope(isolated=True) as scope:
        pin_this_request()
        clock.tick(16)
        monkeypatch.setattr(pool, "current_position", pin_meanwhile)
        state = scope._scope.state(pool.key)
        assert to_inherited_pin(pool, scope._scope, state).pinned_until is not None
        assert where() == "default"
