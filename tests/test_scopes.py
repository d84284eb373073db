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
    is_pinned,
    pin_this_request,
    pinning_scope,
    propagate_scope,
    tokens,
    unpin_this_request,
    use_primary,
    use_replica,
)
from pinning_middleware.routing.outgoing import current_token
from pinning_middleware.routing.policy import Pool
from pinning_middleware.scopes.scope import Facts, Scope, current_scope, enter, entered_scope
from tests.app.models import Account, Book
from tests.conftest import ROUTER, Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

TWO_POOLS = override_settings(
    PINNING_REPLICAS={"default": ["replica1", "replica2"], "users": ["users_replica"]},
    DATABASE_ROUTERS=[ROUTER, "tests.app.routers.UsersRouter"],
)


def write() -> None:
    Book.objects.create(title="x")


def test_a_scope_that_writes_reads_the_primary_until_its_end() -> None:
    with pinning_scope(isolated=True):
        assert is_replica(where())
        write()
        assert where() == "default"
    assert is_replica(where())


def test_one_scope_leaks_nothing_into_the_next() -> None:
    """As the jobs of one worker, in one thread."""
    for _ in range(3):
        with pinning_scope(isolated=True):
            assert not is_pinned()
            write()
    assert entered_scope() is None


def test_a_scope_uses_one_replica_and_the_next_the_next() -> None:
    turns = []
    for _ in range(4):
        with pinning_scope():
            assert len({where() for _ in range(3)}) == 1
            turns.append(where())
    assert turns[:2] == turns[2:]
    assert turns[0] != turns[1]


def test_a_token_carries_the_pin_on(clock: FrozenDateTimeFactory) -> None:
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


def test_no_token_without_a_pin() -> None:
    with pinning_scope() as scope:
        where()
    assert scope.token is None
    assert scope.pins == {}


def test_a_token_in_async_code() -> None:
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
def test_a_token_has_the_pins_of_each_pool() -> None:
    with pinning_scope() as scope:
        Account.objects.create(name="x")
    assert set(scope.pins) == {"users"}
    with pinning_scope(scope.token):
        assert is_replica(where())
        assert where("Account") == "users"


@pytest.mark.parametrize("token", [None, "", "garbage", "x" * 5000])
def test_a_bad_token_is_no_error(token: str | None) -> None:
    tokens.rejected.clear()
    with pinning_scope(token) as scope:
        assert is_replica(where())
    assert scope.token is None
    assert tokens.rejected.total() == bool(token)
    tokens.rejected.clear()


def test_unpinning_takes_the_pin_out_of_the_token() -> None:
    with pinning_scope() as first:
        write()
    with pinning_scope(first.token) as second:
        unpin_this_request()
        assert is_replica(where())
    assert second.token is None


@TWO_POOLS
def test_unpinning_one_pool_lifts_the_method_for_that_one(visit: Visit) -> None:
    def act(request: Any) -> tuple[str, str, bool, bool]:
        unpin_this_request("users")
        return where("Account"), where(), is_pinned("users"), is_pinned("default")

    assert visit(act, "post") == ("users_replica", "default", False, True)


def test_an_error_ends_a_scope_all_the_same() -> None:
    scope = pinning_scope(isolated=True)

    def fail() -> None:
        with scope:
            write()
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert entered_scope() is None
    assert scope.token


# Nesting.


def test_an_inner_scope_knows_what_the_outer_wrote_and_tells_it_what_it_did() -> None:
    with pinning_scope() as outer:
        with pinning_scope() as inner:
            assert not is_pinned()
            write()
        assert where() == "default"
        with pinning_scope():
            assert where() == "default"
    assert outer.token
    assert inner.token


def test_an_isolated_scope_knows_nothing_and_tells_nothing() -> None:
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


def test_a_scope_in_a_shell_knows_what_the_shell_wrote() -> None:
    write()
    with pinning_scope() as inner:
        assert where() == "default"
    assert inner.token
    enter(None)
    with pinning_scope():
        write()
    assert where() == "default"


def test_an_inner_scope_that_only_reads_tells_nothing() -> None:
    with pinning_scope() as outer:
        with pinning_scope():
            where()
        assert not is_pinned()
    assert outer.token is None


def test_a_task_run_in_place_by_a_request(visit: Visit) -> None:
    """What it wrote pins the user of the request."""

    def action(request: Any) -> str:
        with pinning_scope():
            write()
        return where()

    assert visit(action) == "default"
    assert visit() == "default"


def test_a_pin_by_hand_of_an_inner_scope_counts_outside(clock: FrozenDateTimeFactory) -> None:
    with pinning_scope() as outer, pinning_scope():
        pin_this_request(seconds=60)
    clock.tick(50)
    with pinning_scope(outer.token):
        assert where() == "default"


def test_a_scope_may_be_entered_again() -> None:
    scope = pinning_scope(isolated=True)
    with scope:
        write()
    with scope:
        assert is_pinned()
        with scope:
            pass
        assert current_scope() is not None
        assert is_pinned()
    assert entered_scope() is None


# Threads and tasks.


def in_thread(function: Any, context: contextvars.Context | None = None) -> Any:
    found = []

    def run() -> None:
        found.append(context.run(function) if context else function())
        connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_with_the_context_shares_the_scope() -> None:
    with pinning_scope():
        in_thread(write, contextvars.copy_context())
        assert where() == "default"


def test_a_thread_without_it_does_not() -> None:
    with pinning_scope():
        in_thread(write, contextvars.Context())
        assert not is_pinned()


def test_a_token_carries_a_pin_into_a_thread() -> None:
    def job(token: str | None) -> str:
        with pinning_scope(token):
            return where()

    with pinning_scope() as scope:
        write()
        token = scope.token
    assert in_thread(lambda: job(token), contextvars.Context()) == "default"
    assert is_replica(in_thread(lambda: job(None), contextvars.Context()))


def test_scopes_of_concurrent_tasks() -> None:
    """Each enters its own in turn, and one of them writes."""

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


def test_a_scope_entered_in_a_thread_of_async_code() -> None:
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


# Outside any scope: a shell.


def test_a_write_in_a_shell_pins_for_the_window(clock: FrozenDateTimeFactory) -> None:
    assert is_replica(where())
    write()
    assert (where(), is_pinned()) == ("default", True)
    clock.tick(14)
    assert where() == "default"
    clock.tick(2)
    assert (is_replica(where()), is_pinned()) == (True, False)


def test_a_shells_window_counts_from_its_last_write(clock: FrozenDateTimeFactory) -> None:
    write()
    clock.tick(10)
    write()
    clock.tick(10)
    assert where() == "default"
    clock.tick(6)
    assert is_replica(where())


@pytest.mark.parametrize("asks", [lambda: None, is_pinned, where, lambda: use_replica(where)()])
def test_a_shells_window_counts_from_the_end_of_its_transaction(
    clock: FrozenDateTimeFactory, asks: Any
) -> None:
    """That is when the replicas can get it, whatever was asked in between."""
    with transaction.atomic():
        write()
        asks()
        clock.tick(20)
        assert where() == "default"
    assert where() == "default"
    clock.tick(16)
    assert is_replica(where())


def test_a_pin_by_hand_in_a_shell(clock: FrozenDateTimeFactory) -> None:
    pin_this_request(seconds=60)
    clock.tick(59)
    assert where() == "default"
    clock.tick(2)
    assert is_replica(where())


def test_unpin_in_a_shell() -> None:
    write()
    unpin_this_request()
    assert is_replica(where())


def test_one_scope_may_be_entered_by_two_threads_at_once() -> None:
    shared, inside = pinning_scope(), threading.Barrier(2)
    left: list[object] = []

    def work() -> None:
        with pinning_scope(isolated=True), shared:
            inside.wait(timeout=10)
            pin_this_request()
        left.append(entered_scope())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left == [None, None]


# Scopes that are left late, or in another order than they were entered


def rows(number: int) -> Iterator[int]:
    with pinning_scope():
        yield from range(number)


def test_scopes_that_are_left_out_of_order() -> None:
    """Two generators side by side: the first one ends first, though it was entered first."""
    with pinning_scope() as outer:
        around = entered_scope()
        assert len(list(zip(rows(2), rows(2), strict=True))) == 2
        assert entered_scope() is around
        write()
    assert outer.token
    assert entered_scope() is current_scope()


def test_who_ends_last_tells_the_scope_that_is_left() -> None:
    with pinning_scope() as outer:
        first, second = pinning_scope(), pinning_scope()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        write()
        second.__exit__(None, None, None)
        assert where() == "default"
    assert outer.token


def test_a_scope_that_is_collected_later_takes_nobody_elses_away() -> None:
    enter(Scope())
    left = rows(2)
    next(left)
    # The next request of this thread.
    mine = Scope()
    enter(mine)
    left.close()
    assert entered_scope() is mine
    enter(None)


def test_a_scope_inside_another_hands_on_what_that_one_wrote() -> None:
    """Also where nothing was read in it."""
    with pinning_scope():
        write()
        with pinning_scope() as inner, pinning_scope() as innermost:
            pass
        assert inner.token
        assert innermost.token
        assert current_token() == inner.token


def test_a_scope_inside_a_post_reads_as_that_does(visit: Visit) -> None:
    def act(request: Any) -> list[str]:
        with pinning_scope():
            return [where()]

    assert visit(act, "post") == ["default"]
    assert is_replica(visit(act)[0])


def test_one_scope_in_two_others_knows_both_and_tells_each() -> None:
    shared = pinning_scope()
    with pinning_scope(isolated=True) as first, shared:
        write()
    with pinning_scope(isolated=True) as second, shared:
        write()
    with pinning_scope(isolated=True) as third:
        write()
        with shared:
            assert where() == "default"
    assert first.token
    assert second.token
    assert third.token


def test_a_scope_inside_itself() -> None:
    one, other = pinning_scope(), pinning_scope()
    with one, other, one:
        write()
        assert where() == "default"
    assert one.token
    assert entered_scope() is current_scope()


def test_two_scopes_that_know_nothing_are_two() -> None:
    """Who looks for changes of the context compares them (asgiref does)."""
    assert Scope() != Scope()
    assert len({Scope(), Scope()}) == 2


@override_settings(PINNING_SECONDS=15)
@pytest.mark.parametrize("before", [write, pin_this_request])
def test_a_write_that_begins_while_an_older_pin_is_forgotten(
    clock: FrozenDateTimeFactory, monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]
) -> None:
    """In another thread of the scope, between the look at the clock and what follows from it."""
    look = Pool.has_written
    begun: list[bool] = []

    def has_written(self: Pool, scope: Scope, facts: Facts) -> bool:
        found = look(self, scope, facts)
        if not found and not begun:
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
        monkeypatch.setattr(Pool, "has_written", has_written)
        where()
        assert where() == "default"
    assert begun
    assert scope.token
