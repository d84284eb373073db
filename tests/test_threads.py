"""Threads: with a scope of their own, or with that of the starting thread."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connections

from pinning_middleware import (
    ignore_writes,
    is_pinned,
    pinning_scope,
    propagate_scope,
    use_primary,
    use_replica,
)
from pinning_middleware.scopes.scope import entered_scope
from tests.app.models import Book
from tests.conftest import Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    """An executor of one thread, so that leaked state is visible to the next job."""
    with ThreadPoolExecutor(1) as running:
        yield running
        running.submit(connections.close_all).result(30)


def write() -> None:
    Book.objects.create(title="x")


def test_thread_without_propagate_scope_does_not_inherit_the_scope(
    executor: ThreadPoolExecutor,
) -> None:
    with pinning_scope():
        write()
        assert is_replica(executor.submit(where).result(30))
        assert executor.submit(Book.objects.count).result(30) == 0


def test_propagate_scope_reads_writes_of_the_scope(executor: ThreadPoolExecutor) -> None:
    with pinning_scope():
        write()
        assert executor.submit(propagate_scope(where)).result(30) == "default"
        assert executor.submit(propagate_scope(Book.objects.count)).result(30) == 1


def test_propagate_scope_reads_the_replica_of_the_scope(executor: ThreadPoolExecutor) -> None:
    with pinning_scope():
        here = where()
        assert is_replica(here)
        found = {executor.submit(propagate_scope(where)).result(30) for _ in range(4)}
        assert found == {here}


def test_propagate_scope_write_pins_the_starting_scope(executor: ThreadPoolExecutor) -> None:
    with pinning_scope() as scope:
        executor.submit(propagate_scope(write)).result(30)
        assert where() == "default"
    assert scope.token is not None


def test_propagate_scope_of_a_generator_reads_writes_of_the_scope(
    executor: ThreadPoolExecutor,
) -> None:
    def aliases() -> Iterator[str]:
        yield where()
        with use_replica():
            yield where()
            yield where()

    with pinning_scope():
        write()
        generator = propagate_scope(aliases)()
        first, *others = [executor.submit(next, generator).result(30) for _ in range(3)]
    assert first == "default"
    assert all(map(is_replica, others))


def test_propagate_scope_of_an_async_generator_reads_writes_of_the_scope() -> None:
    async def aliases() -> AsyncIterator[str]:
        yield where()

    async def first(generator: AsyncIterator[str]) -> str:
        return await anext(generator)

    with pinning_scope():
        write()
        generator = propagate_scope(aliases)()
    assert async_to_sync(first)(generator) == "default"


def test_propagate_scope_in_a_request(visit: Visit, executor: ThreadPoolExecutor) -> None:
    def act(request: Any) -> str:
        return str(executor.submit(propagate_scope(write)).result(30))

    visit(act)
    assert visit() == "default"
    assert visit(lambda request: executor.submit(propagate_scope(where)).result(30)) == "default"
    assert is_replica(executor.submit(where).result(30))


def test_propagate_scope_restores_the_thread(executor: ThreadPoolExecutor) -> None:
    with pinning_scope():
        write()
        executor.submit(propagate_scope(where)).result(30)
        with pytest.raises(ZeroDivisionError):
            executor.submit(propagate_scope(lambda: 1 / 0)).result(30)
    assert executor.submit(entered_scope).result(30) is None
    assert is_replica(executor.submit(where).result(30))


def test_propagate_scope_propagates_overrides(executor: ThreadPoolExecutor) -> None:
    with pinning_scope() as scope:
        with use_primary():
            assert executor.submit(propagate_scope(where)).result(30) == "default"
        with ignore_writes():
            executor.submit(propagate_scope(write)).result(30)
        assert is_replica(executor.submit(propagate_scope(where)).result(30))
    assert scope.token is None


def test_propagate_scope_with_concurrent_jobs() -> None:
    """map() passes the arguments to one wrapped function."""
    together = threading.Barrier(4)

    def work(number: int) -> str:
        together.wait(30)
        Book.objects.create(title=str(number))
        try:
            return where()
        finally:
            connections.close_all()

    with pinning_scope() as scope, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(propagate_scope(work), range(4))) == ["default"] * 4
        assert Book.objects.count() == 4
    assert scope.token is not None


def test_scope_of_a_thread_pins_no_other_scope(executor: ThreadPoolExecutor) -> None:
    def work() -> tuple[str, str | None]:
        with pinning_scope(isolated=True) as scope:
            write()
            assert where() == "default"
        return where(), scope.token

    with pinning_scope():
        after, token = executor.submit(work).result(30)
        assert is_replica(after)
        assert is_replica(where())
    with pinning_scope(token):
        assert where() == "default"


def test_token_continues_in_a_thread(executor: ThreadPoolExecutor) -> None:
    def work(token: str | None) -> bool:
        with pinning_scope(token):
            return is_pinned()

    with pinning_scope() as scope:
        write()
        assert executor.submit(work, scope.token).result(30)
        assert not executor.submit(work, None).result(30)


def test_scopes_of_two_threads_are_isolated() -> None:
    wrote, looked = threading.Event(), threading.Event()
    seen: list[str] = []

    def writer() -> None:
        with pinning_scope():
            write()
            wrote.set()
            looked.wait(30)
        connections.close_all()

    def reader() -> None:
        with pinning_scope():
            wrote.wait(30)
            seen.append(where())
            looked.set()
        connections.close_all()

    threads = [threading.Thread(target=run) for run in (writer, reader)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert is_replica(seen[0])


def test_propagate_scope_keeps_the_function_name() -> None:
    assert propagate_scope(write).__name__ == "write"
