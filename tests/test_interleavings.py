"""State that threads share, changed by many of them at the shortest switch interval."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from django.db import connections
from django.test import override_settings

from pinning_middleware.pins import PoolKey, Position
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.rotation import Rotation
from pinning_middleware.scopes.scope import Scope
from pinning_middleware.servers.catch_up import CatchUp
from pinning_middleware.servers.registry import Endpoint, Identity, Report, registry
from pinning_middleware.utils import counters

THREADS = 8
TIMES = 1000


@pytest.fixture(autouse=True)
def shortest_switch_interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_at_once(*jobs: Callable[[], object]) -> list[object]:
    """Run each job in a thread of its own, all beginning together; return their results."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> object:
        start.wait(60)
        return job()

    with ThreadPoolExecutor(len(jobs)) as executor:
        return [done.result(60) for done in [executor.submit(run, job) for job in jobs]]


def test_parallel_threads_of_one_scope_lose_no_write_and_disturb_no_reader() -> None:
    scope, connection = Scope(), connections["default"]
    keys = [PoolKey(f"primary{number}") for number in range(20)]

    def write() -> None:
        for number in range(TIMES):
            scope.record_write(keys[number % len(keys)], connection)

    def read() -> None:
        for _ in range(TIMES):
            assert all(state.revision for state in scope.pools.values())

    run_at_once(*[write, read] * THREADS)
    assert sum(state.revision for state in scope.pools.values()) == THREADS * TIMES


def test_rotation_returns_only_what_it_has_while_names_leave_and_return() -> None:
    rotation = Rotation({"one": 2, "two": 1, "last": 1}, {"last": 2})
    allowed = {"one", "two", "last", None}

    def take() -> None:
        after = None
        for _ in range(TIMES):
            after = rotation.next(after)
            assert after in allowed
            assert rotation.next(key="user") in allowed
            assert set(rotation.order()) <= allowed

    def exclude() -> None:
        for number in range(TIMES):
            rotation.exclude([{"one"}, {"two"}, {"one", "two"}, ()][number % 4])

    run_at_once(*[take] * THREADS, exclude)
    assert rotation.names == {"one", "two"}


def test_rotation_gives_each_name_its_share_of_the_turns_of_all_threads() -> None:
    rotation = Rotation({"big": 2, "small": 1})
    turns = run_at_once(*[lambda: [rotation.next() for _ in range(3 * TIMES)]] * THREADS)
    names = [name for each in turns for name in each]  # type: ignore[attr-defined]
    # As many turns as whole rounds have.
    assert names.count("big") == 2 * names.count("small") == 2 * THREADS * TIMES


def test_rotation_agrees_with_the_last_status_of_each_replica() -> None:
    with override_settings(PINNING_SECONDS=15):
        replicas = pools().by_primary["default"].replica_set
        endpoints = [registry.endpoint(alias) for alias in replicas.endpoints]

        def change(endpoint: Endpoint) -> None:
            registry.mark_down(endpoint, Fault.UNREACHABLE, 1000, "by the test")
            registry.mark_up(endpoint)

        for _ in range(100):
            run_at_once(*[partial(change, each) for each in endpoints * THREADS])
            assert {each.out_of_rotation for each in endpoints} == {None}
            assert replicas.out_of_rotation == frozenset()
            assert replicas.rotation.names == set(replicas.rotation.weights)


def test_positions_that_threads_report_of_one_server_only_grow() -> None:
    server = registry.register("default", Identity("1", "interleaved", 1), "")
    logs = [f"log{number}" for number in range(THREADS)]

    def report(log: str) -> None:
        for end in range(TIMES):
            registry.apply_report(server, Report(True, {log: end}), time.monotonic())

    run_at_once(*[partial(report, log) for log in logs])
    assert server.position == dict.fromkeys(logs, TIMES - 1)


def test_server_that_is_behind_is_probed_by_one_thread_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    behind, now = CatchUp(), time.monotonic()
    # freezegun does not stop the clock of functions that a thread calls directly.
    monkeypatch.setattr("pinning_middleware.servers.catch_up.time.monotonic", lambda: now)
    behind.record_probe(Position({"log": 5}), lambda position: False)
    for _ in range(50):
        now += 1
        assert sum(map(bool, run_at_once(*[behind.claim_probe] * THREADS))) == 1


def test_counters_lose_no_event_of_any_thread() -> None:
    before = counters.pin_events.copy()
    counters.pin_events.clear()
    events = [f"event {number}" for number in range(TIMES)]

    def count() -> None:
        for event in events:
            counters.pin_events[event] += 1

    run_at_once(*[count] * THREADS)
    counted = dict(counters.pin_events)
    counters.pin_events.clear()
    counters.pin_events.update(before)
    assert counted == dict.fromkeys(events, THREADS)
