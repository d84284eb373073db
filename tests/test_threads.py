"""Threads: a scope of their own, or the one of whoever started them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.db import connections

from pinning_middleware import (
    ignore_writes,
    is_pinned,
    pinning_scope,
    propagate_scope,
    use_primary,
)
from pinning_middleware.scopes.scope import entered_scope
from tests.app.models import Book
from tests.conftest import Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    """One thread, so that what it keeps from one job is found by the next."""
    with ThreadPoolExecutor(1) as running:
        yield running
        running.submit(connections.close_all).result(30)


def write() -> None:
    Book.objects.create(title="x")


def test_without_help_a_thread_knows_nothing_of_the_scope(executor: ThreadPoolExecutor) -> None:
    with pinning_scope():
        write()
        assert is_replica(executor.submit(where).result(30))
        assert executor.submit(Book.objects.count).result(30) == 0


def test_a_carried_scope_reads_what_it_wrote(executor: ThreadPoolExecutor) -> None:
    with pinning_scope():
        write()
        assert executor.submit(propagate_scope(where)).result(30) == "default"
        assert executor.submit(propagate_scope(Book.objects.count)).result(30) == 1


def test_a_carried_scope_reads_the_replica_of_the_scope(executor: ThreadPoolExecutor) -> None:
    with pinning_scope():
        here = where()
        assert is_replica(here)
        found = {executor.submit(propagate_scope(where)).result(30) for _ in range(4)}
        assert found == {here}


def test_what_the_thread_writes_pins_who_started_it(executor: ThreadPoolExecutor) -> None:
    with pinning_scope() as scope:
        executor.submit(propagate_scope(write)).result(30)
        assert where() == "default"
    assert scope.token is not None


def test_a_request_and_its_threads(visit: Visit, executor: ThreadPoolExecutor) -> None:
    def act(request: Any) -> str:
        return str(executor.submit(propagate_scope(write)).result(30))

    visit(act)
    assert visit() == "default"
    assert visit(lambda request: executor.submit(propagate_scope(where)).result(30)) == "default"
    assert is_replica(executor.submit(where).result(30))


def test_the_thread_is_as_it_was_after_the_job(executor: ThreadPoolExecutor) -> None:
    with pinning_scope():
        write()
        executor.submit(propagate_scope(where)).result(30)
        with pytest.raises(ZeroDivisionError):
            executor.submit(propagate_scope(lambda: 1 / 0)).result(30)
    assert executor.submit(entered_scope).result(30) is None
    assert is_replica(executor.submit(where).result(30))


def test_blocks_are_carried_too(executor: ThreadPoolExecutor) -> None:
    with pinning_scope() as scope:
        with use_primary():
            assert executor.submit(propagate_scope(where)).result(30) == "default"
        with ignore_writes():
            executor.submit(propagate_scope(write)).result(30)
        assert is_replica(executor.submit(propagate_scope(where)).result(30))
    assert scope.token is None


def test_many_jobs_of_one_scope_at_once() -> None:
    """map() gives each job the arguments; the wrapped function is one."""
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


def test_a_threads_own_scope_pins_nobody_else(executor: ThreadPoolExecutor) -> None:
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


def test_a_token_is_carried_to_a_thread(executor: ThreadPoolExecutor) -> None:
    def work(token: str | None) -> bool:
        with pinning_scope(token):
            return is_pinned()

    with pinning_scope() as scope:
        write()
        assert executor.submit(work, scope.token).result(30)
        assert not executor.submit(work, None).result(30)


def test_two_scopes_in_two_threads_do_not_meet() -> None:
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


def test_the_name_of_the_function_stays() -> None:
    assert propagate_scope(write).__name__ == "write"
