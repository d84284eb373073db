from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections, transaction
from django.test import override_settings
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import (
    follow_keys,
    is_pinned,
    pin_keys,
    pin_this_request,
    pinning_scope,
    propagate_scope,
    unpin_this_request,
    use_primary,
    use_replica,
)
from pinning_middleware.handoff import token_to_send
from pinning_middleware.pins import PinKey, PoolKey
from pinning_middleware.reasons import Reason
from pinning_middleware.routing import policy
from pinning_middleware.scopes.scope import PoolState, Scope, current_scope, enter, entered_scope
from pinning_middleware.utils.counters import rejected_tokens
from tests.app.models import Account, Book
from tests.conftest import ROUTER, Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

TWO_POOLS = override_settings(
    PINNING_REPLICAS={"default": ["replica1", "replica2"], "users": ["users_replica"]},
    DATABASE_ROUTERS=[ROUTER, "tests.app.routers.UsersRouter"],
)


def write() -> None:
    Book.objects.create(title="x")


def test_scope_that_writes_reads_the_primary_until_its_end() -> None:
    with pinning_scope(isolated=True):
        assert is_replica(where())
        write()
        assert where() == "default"
    assert is_replica(where())


def test_scopes_share_no_state() -> None:
    """Same as the jobs of one worker, in one thread."""
    for _ in range(3):
        with pinning_scope(isolated=True):
            assert not is_pinned()
            write()
    assert entered_scope() is None


def test_each_scope_uses_the_next_replica() -> None:
    turns = []
    for _ in range(4):
        with pinning_scope():
            assert len({where() for _ in range(3)}) == 1
            turns.append(where())
    assert turns[:2] == turns[2:]
    assert turns[0] != turns[1]


def test_token_propagates_the_pin(clock: FrozenDateTimeFactory) -> None:
    with pinning_scope() as first:
        write()
        inside = first.token
    assert inside == first.token, "inside and after"
    clock.tick(10)
    with pinning_scope(first.token) as second:
        assert (where(), is_pinned()) == ("default", True)
    assert second.token
    clock.tick(10)
    with pinning_scope(second.token) as third:
        assert is_replica(where()), "carrying on lengthens nothing"
    assert third.token is None


def test_token_without_a_pin_is_none() -> None:
    with pinning_scope() as scope:
        where()
    assert scope.token is None
    assert scope.pins == {}


def test_token_in_async_code() -> None:
    async def act() -> tuple[str | None, str]:
        with pinning_scope() as scope:
            await Book.objects.acreate(title="x")
            token = await scope.atoken()
        with pinning_scope(token):
            return token, where()

    token, served = async_to_sync(act)()
    assert token
    assert served == "default"


@TWO_POOLS
def test_token_contains_the_pins_of_each_pool() -> None:
    with pinning_scope() as scope:
        Account.objects.create(name="x")
    assert set(scope.pins) == {PinKey("users")}
    with pinning_scope(scope.token):
        assert is_replica(where())
        assert where("Account") == "users"


@pytest.mark.parametrize("token", [None, "", "garbage", "x" * 5000])
def test_invalid_token_raises_no_error(token: str | None) -> None:
    rejected_tokens.clear()
    with pinning_scope(token) as scope:
        assert is_replica(where())
    assert scope.token is None
    assert sum(rejected_tokens.values()) == bool(token)
    rejected_tokens.clear()


def test_unpinning_removes_the_pin_from_the_token() -> None:
    with pinning_scope() as first:
        write()
    with pinning_scope(first.token) as second:
        unpin_this_request()
        assert is_replica(where())
    assert second.token is None


@TWO_POOLS
def test_unpinning_one_pool_overrides_the_method_for_it_only(visit: Visit) -> None:
    def act(request: Any) -> tuple[str, str, bool, bool]:
        unpin_this_request("users")
        return where("Account"), where(), is_pinned("users"), is_pinned("default")

    assert visit(act, "post") == ("users_replica", "default", False, True)


def test_scope_ends_after_an_error() -> None:
    scope = pinning_scope(isolated=True)

    def fail() -> None:
        with scope:
            write()
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert entered_scope() is None
    assert scope.token


# Nesting


def test_nested_scope_inherits_and_merges_writes() -> None:
    with pinning_scope() as outer:
        with pinning_scope() as inner:
            assert not is_pinned()
            write()
        assert where() == "default"
        with pinning_scope():
            assert where() == "default"
    assert outer.token
    assert inner.token


def test_isolated_scope_neither_inherits_nor_merges() -> None:
    with pinning_scope() as outer:
        with pinning_scope(isolated=True) as inner:
            write()
        assert inner.token
    assert outer.token is None
    with pinning_scope() as outer:
        write()
        with pinning_scope(isolated=True) as inner:
            assert is_replica(where())
        with use_primary(), pinning_scope(isolated=True):
            assert is_replica(where()), "nor what blocks are open"
        assert where() == "default"
        assert inner.token is None


def test_scope_in_a_shell_inherits_writes_of_the_shell() -> None:
    write()
    with pinning_scope() as inner:
        assert where() == "default"
    assert inner.token
    enter(None)
    with pinning_scope():
        write()
    assert where() == "default"


def test_nested_scope_that_has_read_sees_a_later_write_of_the_outer_scope() -> None:
    """Of another task or thread of the outer scope."""
    with pinning_scope(isolated=True):
        add = propagate_scope(write)
        with pinning_scope():
            assert is_replica(where())
            add()
            assert where() == "default"


def test_nested_scope_that_only_reads_merges_nothing() -> None:
    with pinning_scope() as outer:
        with pinning_scope():
            where()
        assert not is_pinned()
    assert outer.token is None


def test_task_run_synchronously_by_a_request(visit: Visit) -> None:
    """Its write pins the user of the request."""

    def action(request: Any) -> str:
        with pinning_scope():
            write()
        return where()

    assert visit(action) == "default"
    assert visit() == "default"


def test_manual_pin_of_a_nested_scope_applies_to_the_outer_scope(
    clock: FrozenDateTimeFactory,
) -> None:
    with pinning_scope() as outer, pinning_scope():
        pin_this_request(seconds=60)
    clock.tick(50)
    with pinning_scope(outer.token):
        assert where() == "default"


@pytest.mark.parametrize("is_inside", [True, False])
def test_scope_entered_twice_raises(is_inside: bool) -> None:
    scope = pinning_scope(isolated=True)
    with scope:
        write()
        if is_inside:
            with pytest.raises(RuntimeError, match="was entered before"), scope:
                pass
    if not is_inside:
        with pytest.raises(RuntimeError, match="was entered before"), scope:
            pass
    assert entered_scope() is None
    assert scope.token


# Threads and tasks


def in_thread(function: Any, context: contextvars.Context | None = None) -> Any:
    found = []

    def run() -> None:
        found.append(context.run(function) if context else function())
        connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_thread_with_the_context_shares_the_scope() -> None:
    with pinning_scope():
        in_thread(write, contextvars.copy_context())
        assert where() == "default"


def test_thread_without_the_context_does_not_share_the_scope() -> None:
    with pinning_scope():
        in_thread(write, contextvars.Context())
        assert not is_pinned()


def test_token_propagates_a_pin_to_a_thread() -> None:
    def job(token: str | None) -> str:
        with pinning_scope(token):
            return where()

    with pinning_scope() as scope:
        write()
        token = scope.token
    assert in_thread(lambda: job(token), contextvars.Context()) == "default"
    assert is_replica(in_thread(lambda: job(None), contextvars.Context()))


def test_scopes_of_concurrent_tasks() -> None:
    """Each enters its own scope, and one of them writes."""

    async def act() -> list[bool]:
        turn = asyncio.Barrier(2)

        async def one(writes: bool) -> bool:
            with pinning_scope():
                await turn.wait()
                if writes:
                    await Book.objects.acreate(title="x")
                await turn.wait()
                return is_pinned()

        return await asyncio.gather(one(True), one(False))

    assert async_to_sync(act)() == [True, False]


def test_scope_entered_in_a_thread_of_async_code() -> None:
    def job() -> str | None:
        with pinning_scope() as scope:
            write()
        return scope.token

    async def act() -> tuple[Any, bool]:
        with pinning_scope():
            return await sync_to_async(job)(), is_pinned()

    token, pinned = async_to_sync(act)()
    assert token
    assert pinned


# Outside a scope: a shell


def test_tables_created_outside_scopes_do_not_pin(
    clock: FrozenDateTimeFactory,
) -> None:
    """Same as a test runner: SQLite's schema editor sets and restores PRAGMA foreign_keys."""
    with connections["default"].schema_editor():
        pass
    clock.tick(60)
    assert is_replica(where())
    with pinning_scope():
        assert is_replica(where())


def test_write_outside_a_scope_pins_for_the_window(clock: FrozenDateTimeFactory) -> None:
    assert is_replica(where())
    write()
    assert (where(), is_pinned()) == ("default", True)
    clock.tick(14)
    assert where() == "default"
    clock.tick(2)
    assert (is_replica(where()), is_pinned()) == (True, False)


def test_window_outside_a_scope_starts_at_the_last_write(clock: FrozenDateTimeFactory) -> None:
    write()
    clock.tick(10)
    write()
    clock.tick(10)
    assert where() == "default"
    clock.tick(6)
    assert is_replica(where())


@pytest.mark.parametrize("asks", [lambda: None, is_pinned, where, lambda: use_replica(where)()])
def test_window_outside_a_scope_starts_at_the_end_of_the_transaction(
    clock: FrozenDateTimeFactory, asks: Any
) -> None:
    """Replicas can receive the write only then, regardless of reads in between."""
    with transaction.atomic():
        write()
        asks()
        clock.tick(20)
        assert where() == "default"
    assert where() == "default"
    clock.tick(16)
    assert is_replica(where())


def test_manual_pin_outside_a_scope(clock: FrozenDateTimeFactory) -> None:
    pin_this_request(seconds=60)
    clock.tick(59)
    assert where() == "default"
    clock.tick(2)
    assert is_replica(where())


def test_unpin_outside_a_scope() -> None:
    write()
    unpin_this_request()
    assert is_replica(where())


# Scopes that are exited late, or in another order than they were entered


def rows(number: int) -> Iterator[int]:
    with pinning_scope():
        yield from range(number)


def test_scopes_exited_out_of_order() -> None:
    """Two generators: the scope that was entered first ends first."""
    with pinning_scope() as outer:
        around = entered_scope()
        assert len(list(zip(rows(2), rows(2), strict=True))) == 2
        assert entered_scope() is around
        write()
    assert outer.token
    assert entered_scope() is current_scope()


def test_last_scope_to_end_merges_into_the_remaining_scope() -> None:
    with pinning_scope() as outer:
        first, second = pinning_scope(), pinning_scope()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        write()
        second.__exit__(None, None, None)
        assert where() == "default"
    assert outer.token


def test_late_collected_scope_does_not_pop_another_scope() -> None:
    enter(Scope())
    left = rows(2)
    next(left)
    # The next request of this thread.
    mine = Scope()
    enter(mine)
    left.close()
    assert entered_scope() is mine
    enter(None)


def test_token_of_a_nested_scope_contains_writes_of_the_outer_scope() -> None:
    """Also if the nested scope has read nothing."""
    with pinning_scope():
        write()
        with pinning_scope() as inner, pinning_scope() as innermost:
            pass
        assert inner.token
        assert innermost.token
        assert token_to_send() == inner.token


def test_scope_inside_a_post_reads_the_primary(visit: Visit) -> None:
    def act(request: Any) -> list[str]:
        with pinning_scope():
            return [where()]

    assert visit(act, "post") == ["default"]
    assert is_replica(visit(act)[0])


def test_empty_scopes_are_not_equal() -> None:
    """asgiref compares the values of context variables to detect changes."""
    assert Scope() != Scope()
    assert len({Scope(), Scope()}) == 2


@override_settings(PINNING_SECONDS=15)
@pytest.mark.parametrize("before", [write, pin_this_request])
def test_write_that_starts_while_an_expired_pin_is_removed(
    clock: FrozenDateTimeFactory, monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]
) -> None:
    """The other thread writes between the check of the clock and the removal of the pin."""
    look = policy.own_pin_reason
    begun: list[bool] = []

    def own_pin_reason(scope: Scope, state: PoolState) -> Reason | None:
        found = look(scope, state)
        if found is None and not begun:
            begun.append(True)
            thread = threading.Thread(target=propagate_scope(work))
            thread.start()
            thread.join()
        return found

    def work() -> None:
        write()
        connections.close_all()

    with pinning_scope() as scope:
        before()
        clock.tick(20)
        monkeypatch.setattr(policy, "own_pin_reason", own_pin_reason)
        where()
        assert where() == "default"
    assert begun
    assert scope.token


@override_settings(PINNING_ENABLED=False)
def test_scope_makes_no_pins_while_the_package_is_disabled() -> None:
    with pinning_scope() as scope:
        write()
        pin_this_request()
        pin_keys("order:1")
    assert scope.token is None
    with override_settings(PINNING_ENABLED=True), pinning_scope(isolated=True):
        follow_keys("order:1")
        assert is_replica(where())


@override_settings(PINNING_CONSISTENCY="monotonic-reads")
def test_monotonic_reads_of_a_database_without_positions_use_replicas() -> None:
    with pinning_scope(isolated=True):
        assert Book.objects.count() == 0
        assert is_replica(where())


def test_nested_scope_continues_what_the_outer_scope_has_read() -> None:
    """Under monotonic-reads it depends on that which replica may serve next."""
    key = PoolKey("default")
    older, newer = ("replica1", object()), ("replica2", object())
    with pinning_scope(isolated=True):
        outer = current_scope()
        outer.update(key, lambda state: state._replace(read_from=(newer, older)))
        with pinning_scope():
            assert current_scope().state(key).read_from == (newer, older)
            current_scope().update(key, lambda state: state._replace(read_from=(older, newer)))
        assert outer.state(key).read_from == (older, newer)


def test_late_block_in_an_event_loop_saves_its_pins_in_a_thread() -> None:
    saved: list[int] = []
    ended = Scope()
    ended.close(15, lambda scope: saved.append(threading.get_ident()))

    async def run() -> int:
        enter(ended)
        async with pinning_scope():
            pin_this_request()
        return threading.get_ident()

    loop = contextvars.copy_context().run(asyncio.run, run())
    assert saved
    assert loop not in saved


asked_for: list[Any] = []


def may_offload(request: Any) -> bool:
    asked_for.append(request)
    return True


@override_settings(PINNING_OFFLOAD="tests.test_scopes.may_offload")
def test_offload_function_is_called_once_for_a_request_with_nested_scopes(visit: Visit) -> None:
    def act(request: Any) -> list[str]:
        found = []
        for _ in range(2):
            with pinning_scope():
                found.append(where())
        return [*found, where()]

    asked_for.clear()
    assert all(is_replica(alias) for alias in visit(act))
    assert len(asked_for) == 1
