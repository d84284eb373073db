"""One scope in many threads at the shortest switch interval."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import connections

from pinning_middleware.pins import PoolKey
from pinning_middleware.scopes.scope import Scope

THREADS = 8
WRITES = 1000


@pytest.fixture(autouse=True)
def shortest_switch_interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_parallel_threads_of_one_scope_lose_no_write_and_disturb_no_reader() -> None:
    scope, connection = Scope(), connections["default"]
    keys = [PoolKey(f"primary{number}") for number in range(20)]

    def write(thread: int) -> None:
        for number in range(WRITES):
            scope.record_write(keys[(thread + number) % len(keys)], connection)

    def read(_: int) -> None:
        for _ in range(WRITES):
            assert all(state.revision for state in scope.pools.values())

    with ThreadPoolExecutor(2 * THREADS) as executor:
        for done in [executor.submit(job, n) for n in range(THREADS) for job in (write, read)]:
            done.result(60)

    assert sum(state.revision for state in scope.pools.values()) == THREADS * WRITES
