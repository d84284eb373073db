"""Celery: a real worker over Valkey, and paused PostgreSQL replicas."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.result import AsyncResult
from django.core import checks
from django.db import transaction
from django.test import override_settings

from pinning_middleware import celery as carrying
from pinning_middleware import pin_this_request, pinning_scope
from pinning_middleware.scopes.scope import entered_scope
from pinning_middleware.utils import counters
from tests.app.models import Book
from tests.conftest import Browser
from tests.real import worker as tasks
from tests.real.conftest import PostgreSQL, alias_of_port, entries_of, eventually, server
from tests.real.sample import ROOT
from tests.valkey import valkey

__all__ = ["valkey"]

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}
LONG = 60


class Worker:
    """`celery worker` as a process; `pool` is Celery's, `bare` does not propagate pins."""

    def __init__(self, kind: str, broker: str, databases: dict[str, Any], log: Path) -> None:
        self.log = log
        environ = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.real.worker_settings",
            "WORKER_BROKER": broker,
            "WORKER_CARRIES": "0" if kind == "bare" else "1",
            "WORKER_DATABASES": json.dumps(databases),
        }
        pool = "prefork" if kind == "bare" else kind
        options = [f"--pool={pool}", "--concurrency=1", "--loglevel=INFO"]
        options += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "tests.real.worker", "worker", *options],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Worker:
        try:
            ready = eventually(lambda: " ready." in self.output or self.ended, LONG)
            assert ready, self.output
            assert not self.ended, self.output
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None


@pytest.fixture(scope="module", autouse=True)
def broker(valkey: str) -> None:
    # Before any task is sent, also eagerly: the app keeps its first connections.
    tasks.app.conf.broker_url = tasks.app.conf.result_backend = valkey


@pytest.fixture(scope="module", params=["prefork", "threads"])
def worker(
    request: pytest.FixtureRequest, valkey: str, cluster: Any, tmp_path_factory: Any
) -> Iterator[Worker]:
    log = tmp_path_factory.mktemp("worker") / "log"
    with Worker(request.param, valkey, entries_of(cluster), log) as running:
        yield running


@pytest.fixture(autouse=True)
def long_window() -> Iterator[None]:
    """Use a window that does not end during a test on a busy machine."""
    with override_settings(PINNING_SECONDS=600):
        yield


def result(sent: AsyncResult[Any]) -> Any:
    # get() waits for a message, which it may miss if the result is stored just before.
    assert eventually(sent.ready, LONG)
    return sent.get(timeout=LONG)


def answer(sent: AsyncResult[Any]) -> tuple[bool, str]:
    """Return whether the task saw the row, and the alias of the server it read from."""
    found = result(sent)
    return found["seen"], alias_of_port(found["port"])


def write(title: str = "new") -> None:
    Book.objects.create(title=title)


@pytest.fixture
def in_request(do: Callable[..., str], new_browser: Callable[..., Browser]) -> Callable[..., Any]:
    """Return a function that runs an action in a request, and returns its result."""

    def run(action: Callable[[], Any]) -> Any:
        found: list[Any] = []
        new_browser().post(f"/sync/{do(lambda request: found.append(action()))}/")
        return found[0]

    return run


def write_and_send() -> AsyncResult[Any]:
    write()
    return tasks.see.delay("new")


def test_task_reads_writes_of_its_request(
    pg: PostgreSQL, worker: Worker, in_request: Callable[..., Any]
) -> None:
    """The replicas are paused, so they do not have the row."""
    pg.pause()
    assert answer(in_request(write_and_send)) == (True, "pg")


@pytest.mark.parametrize("worker", ["bare"], indirect=True)
def test_task_without_the_pin_reads_stale_data(
    pg: PostgreSQL, worker: Worker, in_request: Callable[..., Any]
) -> None:
    pg.pause()
    seen, alias = answer(in_request(write_and_send))
    assert (seen, alias in REPLICAS) == (False, True)


def test_task_without_lag_reads_a_replica(
    pg: PostgreSQL, worker: Worker, in_request: Callable[..., Any]
) -> None:
    def act() -> AsyncResult[Any]:
        write()
        pg.wait_for()
        return tasks.see.delay("new")

    seen, alias = answer(in_request(act))
    assert (seen, alias in REPLICAS) == (True, True)


def test_task_reads_a_caught_up_replica(pg: PostgreSQL, worker: Worker) -> None:
    pg.pause("pg2")
    with pinning_scope():
        write()
        pg.wait_for("pg1")
        assert [answer(tasks.see.delay("new")) for _ in range(3)] == [(True, "pg1")] * 3


def test_scope_ends_with_the_task(pg: PostgreSQL, worker: Worker) -> None:
    """Laravel's sticky reads leaked into the next job; this worker has one process."""
    pg.pause()
    with pinning_scope(isolated=True):
        assert answer(write_and_send()) == (True, "pg")
    for _ in range(3):
        seen, alias = answer(tasks.see.delay("new"))
        assert (seen, alias in REPLICAS) == (False, True)
    assert result(tasks.add.delay("by a task")) == "by a task"
    assert answer(tasks.see.delay("by a task"))[0] is False


def test_scope_ends_after_the_task_raised(pg: PostgreSQL, worker: Worker) -> None:
    pg.pause()
    with pytest.raises(LookupError):
        result(tasks.add_and_fail.delay("lost"))
    assert answer(tasks.see.delay("lost"))[0] is False


def test_task_reads_its_writes_and_propagates_them(pg: PostgreSQL, worker: Worker) -> None:
    pg.pause()
    with pinning_scope():
        write()
        inner = result(tasks.pass_on.delay("new"))
    assert answer(tasks.app.AsyncResult(inner)) == (True, "pg")


def test_retry_keeps_the_pins(pg: PostgreSQL, worker: Worker) -> None:
    """The pins of the message, and of the writes of the first attempt."""
    pg.pause()
    with pinning_scope():
        write()
        sent = tasks.try_twice.delay("new")
    assert answer(sent) == (True, "pg")


def test_countdown_keeps_the_pins(pg: PostgreSQL, worker: Worker) -> None:
    pg.pause()
    with pinning_scope():
        write()
        sent = tasks.see.apply_async(("new",), countdown=0.5)
    assert answer(sent) == (True, "pg")


def test_chain_propagates_pins(pg: PostgreSQL, worker: Worker) -> None:
    """Each task reads the writes of the previous ones and of the sender."""
    pg.pause()
    with pinning_scope():
        write()
        sent = chain(
            tasks.add.si("one"), tasks.add.si("two"), tasks.see.si("new", "one", "two")
        ).apply_async()
    assert answer(sent) == (True, "pg")


def test_chain_without_an_earlier_write_propagates_pins(pg: PostgreSQL, worker: Worker) -> None:
    pg.pause()
    assert answer(chain(tasks.add.si("one"), tasks.see.si("one")).apply_async()) == (True, "pg")


def test_chord_body_reads_writes_of_all_parts(pg: PostgreSQL, worker: Worker) -> None:
    pg.pause()
    parts = group(tasks.add.si(f"part {number}") for number in range(4))
    assert answer(chord(parts)(tasks.see_all.s())) == (True, "pg")


def test_chord_body_of_several_tasks_reads_what_the_header_wrote(
    pg: PostgreSQL, worker: Worker
) -> None:
    def parts() -> Any:
        return [tasks.add.si(f"part {secrets.token_hex(4)}") for _ in range(2)]

    pg.pause()
    sent = chord(parts())(chain(tasks.see_all.s(), tasks.same.s()))
    assert answer(sent) == (True, "pg")
    both = chord(parts())(group(tasks.see_all.s(), tasks.see_all.s()))
    assert [found["seen"] for found in result(both)] == [True, True]


def test_message_of_a_chord_part_has_no_pins_of_other_scopes(
    pg: PostgreSQL, worker: Worker
) -> None:
    pg.pause()
    with pinning_scope(isolated=True):
        write("by another user")
    sent = chord([tasks.pass_on.si("by another user")] * 2)(tasks.same.s())
    for inner in result(sent):
        seen, alias = answer(tasks.app.AsyncResult(inner))
        assert (seen, alias in REPLICAS) == (False, True)


def test_chord_without_lag_reads_a_replica(pg: PostgreSQL, worker: Worker) -> None:
    """A replica can reach a position that is later than those of all parts."""
    parts = group(tasks.see.si() for _ in range(2))
    sent = chord(parts)(tasks.see_when_there.si())
    assert answer(sent)[1] in REPLICAS


def test_task_with_the_primary_policy(pg: PostgreSQL, worker: Worker) -> None:
    assert answer(tasks.see_on_primary.delay())[1] == "pg"
    with pinning_scope():
        write()
        pg.wait_for()
        assert answer(tasks.see_on_primary.delay("new")) == (True, "pg")


def test_task_with_the_wait_policy(pg: PostgreSQL, worker: Worker) -> None:
    pg.pause()
    with pinning_scope():
        write()
        sent = tasks.see_when_there.delay("new")
    assert eventually(lambda: sent.state == "STARTED")
    pg.resume("pg1")
    assert answer(sent) == (True, "pg1")


def test_task_with_the_wait_policy_times_out(pg: PostgreSQL, worker: Worker) -> None:
    pg.pause()
    with pinning_scope():
        write()
        assert answer(tasks.see_soon.delay("new")) == (True, "pg")


def test_task_with_the_retry_policy_is_requeued_until_a_replica_has_caught_up(
    pg: PostgreSQL, worker: Worker
) -> None:
    pg.pause()
    with pinning_scope():
        write()
        sent = tasks.see_by_retry.delay("new")
        followed = chain(tasks.same.si(0), tasks.see_by_retry.si("new")).apply_async()
    assert eventually(lambda: (sent.state, followed.state) == ("RETRY", "RETRY"), LONG)
    # The worker is free meanwhile.
    assert result(tasks.same.delay("other work")) == "other work"
    pg.resume("pg1")
    for one in (sent, followed):
        assert answer(one) == (True, "pg1")
        assert result(one)["requeued"] >= 1
        assert result(one)["retries"] == 0, "these are the task's own"


def test_task_with_the_retry_policy_reads_the_primary_at_last(
    pg: PostgreSQL, worker: Worker
) -> None:
    pg.pause()
    with pinning_scope():
        write()
        sent = tasks.see_by_one_retry.delay("new")
    assert answer(sent) == (True, "pg")
    found = result(sent)
    assert found["requeued"] == 1
    assert found["stats"]["requeued"] >= found["stats"]["primary"] == 1


def test_task_with_the_retry_policy_without_lag_is_not_requeued(
    pg: PostgreSQL, worker: Worker
) -> None:
    with pinning_scope():
        write()
        pg.wait_for()
        sent = tasks.see_by_retry.delay("new")
    seen, alias = answer(sent)
    assert (seen, alias in REPLICAS, result(sent)["requeued"]) == (True, True, None)


def test_task_sent_on_commit(
    pg: PostgreSQL, worker: Worker, in_request: Callable[..., Any]
) -> None:
    def act() -> AsyncResult[Any]:
        sent: list[AsyncResult[Any]] = []
        with transaction.atomic(using="pg"):
            write()
            transaction.on_commit(lambda: sent.append(tasks.see.delay("new")), using="pg")
            assert not sent
        return sent[0]

    pg.pause()
    assert answer(in_request(act)) == (True, "pg")


# Eager tasks


@pytest.fixture
def eager() -> Iterator[None]:
    tasks.app.conf.task_always_eager = True
    yield
    tasks.app.conf.task_always_eager = False


def test_eager_task_reads_writes_of_its_caller(
    pg: PostgreSQL, eager: None, in_request: Callable[..., Any]
) -> None:
    pg.pause()
    assert answer(in_request(write_and_send)) == (True, "pg")


def test_caller_reads_writes_of_an_eager_task(
    pg: PostgreSQL, eager: None, in_request: Callable[..., Any]
) -> None:
    pg.pause()

    def act() -> str:
        tasks.add.delay("in place")
        return server()

    assert in_request(act) == "pg"


def test_scope_ends_with_an_eager_task(pg: PostgreSQL, eager: None) -> None:
    pg.pause()
    assert entered_scope() is None
    tasks.add.delay("in place")
    left = entered_scope()
    assert left is not None
    assert left.is_ambient, "who called it knows what it did"
    with pinning_scope():
        before = entered_scope()
        assert tasks.add_and_fail.delay("in place").failed()
        assert entered_scope() is before


def test_eager_retry_reads_writes_of_the_first_attempt(pg: PostgreSQL, eager: None) -> None:
    pg.pause()
    with pinning_scope():
        before = entered_scope()
        write()
        assert answer(tasks.try_twice.delay("new")) == (True, "pg")
        assert entered_scope() is before


def test_eager_task_with_the_retry_policy_reads_the_primary(pg: PostgreSQL, eager: None) -> None:
    counters.task_retries.clear()
    pg.pause()
    with pinning_scope(isolated=True) as earlier:
        write()
    with pinning_scope(earlier.token, isolated=True):
        assert answer(tasks.see_by_retry.delay("new")) == (True, "pg")
    assert not counters.task_retries


def test_eager_chain_and_chord(pg: PostgreSQL, eager: None) -> None:
    pg.pause()
    with pinning_scope():
        sent = chain(tasks.add.si("one"), tasks.see.si("one")).apply_async()
        assert answer(sent) == (True, "pg")
        parts = group(tasks.add.si(f"part {number}") for number in range(2))
        assert answer(chord(parts)(tasks.see_all.s())) == (True, "pg")


# Message headers


@pytest.fixture
def sent_headers() -> Iterator[list[dict[str, Any]]]:
    """Record the headers of sent tasks, as the broker receives them."""
    from celery.signals import after_task_publish

    found: list[dict[str, Any]] = []

    def note(headers: dict[str, Any], **kwargs: Any) -> None:
        found.append(headers)

    after_task_publish.connect(note, weak=False)
    yield found
    after_task_publish.disconnect(note)


def test_task_without_a_write_has_no_pins(
    pg: PostgreSQL, broker: None, sent_headers: list[dict[str, Any]]
) -> None:
    with pinning_scope(isolated=True):
        tasks.see.apply_async(queue="nobody")
        server()
        tasks.see.apply_async(queue="nobody", headers={carrying.HEADER: "an older one"})
        pin_this_request()
        tasks.see.apply_async(queue="nobody")
    tasks.see.apply_async(queue="nobody")
    assert [carrying.HEADER in headers for headers in sent_headers] == [False, False, True, False]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"pinning": "sometimes"},
            "pinning must be one of 'sticky', 'primary', 'wait', 'retry', not 'sometimes'",
        ),
        (
            {"pinning": "retry", "pinning_retries": "3"},
            "pinning_retries must be an integer, 0 or more, not '3'",
        ),
    ],
)
def test_invalid_policy_is_a_check_error_and_reads_the_primary(
    pg: PostgreSQL, caplog: pytest.LogCaptureFixture, options: dict[str, Any], problem: str
) -> None:
    before = set(checks.registry.registry.registered_checks)
    app = Celery("wrong", set_as_current=False)
    try:
        carrying.propagate_pins(app)

        @app.task(name="wrong.task", shared=False, **options)
        def wrong() -> str:
            return server()

        app.finalize()
        says = f"Task wrong.task: {problem}"
        assert says in caplog.text
        (error,) = [one for one in checks.run_checks() if one.id == "pinning_middleware.E101"]
        assert says in error.msg
        assert wrong.apply().get() == "pg"
    finally:
        checks.registry.registry.registered_checks.intersection_update(before)
