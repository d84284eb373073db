"""RQ, dramatiq and huey over Valkey; the replicas are SQLite files that lag forever."""

from __future__ import annotations

import importlib.util
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from django.core.cache import caches
from django.db import connections
from django.test import override_settings

from pinning_middleware import pin_this_request, pinning_scope
from pinning_middleware.scopes.scope import enter, entered_scope
from tests.app.models import Book
from tests.conftest import is_replica, where
from tests.real.layouts.waiting import missing
from tests.valkey import pins_in, redis_cache, valkey

__all__ = ["valkey"]

pytestmark = [
    pytest.mark.real,
    pytest.mark.django_db(transaction=True, databases="__all__"),
    # Raised by dramatiq before 2.2 if memcached's client is not installed.
    pytest.mark.filterwarnings("ignore:MemcachedBackend is not available:ImportWarning"),
]

# The results of the jobs of this process, by name.
found: dict[str, list[str]] = {}


def look(name: str) -> None:
    found.setdefault(name, []).append(where())


def add(name: str) -> None:
    Book.objects.create(title=name)


def add_and_fail(name: str) -> None:
    """Write and raise; the second attempt, if any, only reads."""
    look(name)
    if len(found[name]) == 1:
        add(name)
        raise LookupError(name)


def pass_on(name: str) -> None:
    """Write, and send a job that reads."""
    add(name)
    Queue.current.send(look, name)


FUNCTIONS = (look, add, add_and_fail, pass_on)


class Queue:
    """Common interface of the queues, which are empty and run jobs on demand."""

    package: ClassVar[str]
    current: ClassVar[Queue]

    def __init__(self, url: str) -> None:
        if importlib.util.find_spec(self.package) is None:
            missing(f"{self.package} is missing: pip install {self.package}")
        Queue.current = self
        self.open(url)

    def open(self, url: str) -> None:
        raise NotImplementedError

    def send(self, function: Callable[[str], None], name: str, retry: bool = False) -> None:
        raise NotImplementedError

    def send_chain(self, first: Callable[[str], None], second: Callable[[str], None]) -> None:
        raise NotImplementedError

    def send_group(self, part: Callable[[str], None], last: Callable[[str], None]) -> None:
        """Send two jobs, and one that waits for both."""
        raise NotImplementedError

    def work(self) -> None:
        """Run all waiting jobs in one worker."""
        raise NotImplementedError

    def close(self) -> None:
        pass


class RQ(Queue):
    package = "rq"

    def open(self, url: str) -> None:
        from redis import Redis
        from rq import Queue as Jobs

        from pinning_middleware.contrib.rq import PinnedJob

        self._redis = Redis.from_url(url)
        self._redis.flushdb()
        self.jobs = Jobs(connection=self._redis, job_class=PinnedJob)

    def send(self, function: Callable[[str], None], name: str, retry: bool = False) -> None:
        from rq import Retry

        self.jobs.enqueue(function, name, retry=Retry(max=1) if retry else None)

    def send_chain(self, first: Callable[[str], None], second: Callable[[str], None]) -> None:
        self.jobs.enqueue(second, "chain", depends_on=self.jobs.enqueue(first, "first"))

    def send_group(self, part: Callable[[str], None], last: Callable[[str], None]) -> None:
        parts = [self.jobs.enqueue(function, "part") for function in (part, look)]
        self.jobs.enqueue(last, "group", depends_on=parts)

    def work(self) -> None:
        from rq import SimpleWorker

        worker = SimpleWorker([self.jobs], connection=self._redis, job_class=self.jobs.job_class)
        # The worker replaces signal handlers, and does not restore them.
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            worker.work(burst=True, logging_level=logging.CRITICAL)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def close(self) -> None:
        self._redis.close()


class Dramatiq(Queue):
    package = "dramatiq"

    def open(self, url: str) -> None:
        import dramatiq
        from dramatiq.brokers.redis import RedisBroker
        from dramatiq.rate_limits.backends import StubBackend

        from pinning_middleware.contrib.dramatiq import propagate_pins

        middleware = [
            dramatiq.middleware.GroupCallbacks(StubBackend()),
            dramatiq.middleware.Pipelines(),
            dramatiq.middleware.Retries(max_retries=0, min_backoff=1, max_backoff=1),
        ]
        self.broker = RedisBroker(url=url, middleware=middleware)
        propagate_pins(self.broker)
        self.actors = {
            function: dramatiq.actor(function, broker=self.broker) for function in FUNCTIONS
        }
        self.broker.flush_all()

    def send(self, function: Callable[[str], None], name: str, retry: bool = False) -> None:
        options = {"max_retries": 1} if retry else {}
        self.actors[function].send_with_options(args=(name,), **options)

    def message(self, function: Callable[[str], None], name: str) -> Any:
        return self.actors[function].message_with_options(args=(name,), pipe_ignore=True)

    def send_chain(self, first: Callable[[str], None], second: Callable[[str], None]) -> None:
        import dramatiq

        stages = [self.message(first, "first"), self.message(second, "chain")]
        dramatiq.pipeline(stages, broker=self.broker).run()

    def send_group(self, part: Callable[[str], None], last: Callable[[str], None]) -> None:
        import dramatiq

        parts = [self.message(function, "part") for function in (part, look)]
        group = dramatiq.group(parts, broker=self.broker)
        group.add_completion_callback(self.message(last, "group"))
        group.run()

    def work(self) -> None:
        from dramatiq import Worker

        worker = Worker(self.broker, worker_timeout=10, worker_threads=1)
        worker.start()
        try:
            self.broker.join("default", timeout=60_000)
            worker.join()
        finally:
            worker.stop()

    def close(self) -> None:
        self.broker.close()
        self.broker.client.close()


class Huey(Queue):
    package = "huey"

    def open(self, url: str) -> None:
        from huey import RedisHuey

        from pinning_middleware.contrib.huey import PinnedHuey

        class Pinned(PinnedHuey, RedisHuey):
            pass

        self.huey = Pinned("tests", url=url)
        self.huey.storage.flush_all()
        self.tasks = {function: self.huey.task()(function) for function in FUNCTIONS}

    def send(self, function: Callable[[str], None], name: str, retry: bool = False) -> None:
        self.huey.enqueue(self.tasks[function].s(name, retries=1 if retry else 0))

    def send_chain(self, first: Callable[[str], None], second: Callable[[str], None]) -> None:
        self.huey.enqueue(self.tasks[first].s("first").then(self.tasks[second], "chain"))

    def send_group(self, part: Callable[[str], None], last: Callable[[str], None]) -> None:
        from huey import chord

        def end(results: list[Any]) -> None:
            last("group")

        parts = [self.tasks[function].s("part") for function in (part, look)]
        self.huey.enqueue(chord(parts, self.huey.task()(end).s()))

    def work(self) -> None:
        def run() -> None:
            while (task := self.huey.dequeue()) is not None:
                self.huey.execute(task)
            connections.close_all()

        # Same as the consumer of huey, which polls.
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()

    def close(self) -> None:
        self.huey.storage.close()


@pytest.fixture(autouse=True)
def pins(valkey: str) -> Iterator[None]:
    """Use a window that does not end during a test on a busy machine."""
    with override_settings(PINNING_SECONDS=600), pins_in(redis_cache(valkey)):
        caches["pins"].clear()
        found.clear()
        yield


@pytest.fixture(params=[RQ, Dramatiq, Huey], ids=lambda kind: kind.package)
def queue(request: pytest.FixtureRequest, valkey: str) -> Iterator[Any]:
    opened = request.param(valkey)
    yield opened
    opened.close()


def test_job_reads_writes_before_it_was_sent(queue: Queue) -> None:
    with pinning_scope(isolated=True):
        add("x")
        queue.send(look, "look")
    queue.work()
    assert found["look"] == ["default"]


def test_manual_pin_propagates(queue: Queue) -> None:
    with pinning_scope(isolated=True):
        pin_this_request()
        queue.send(look, "look")
    queue.work()
    assert found["look"] == ["default"]


def test_message_without_a_write_has_no_pins(queue: Queue) -> None:
    with pinning_scope(isolated=True):
        where()
        queue.send(look, "inside")
    enter(None)
    queue.send(look, "outside")
    queue.work()
    assert is_replica(*found["inside"])
    assert is_replica(*found["outside"])


def test_scope_ends_with_its_job(queue: Queue) -> None:
    """One worker runs unrelated jobs one after another, and one of them fails."""
    with pinning_scope(isolated=True):
        add("x")
        queue.send(look, "writer")
        queue.send(add_and_fail, "failing")
    queue.send(add, "another")
    queue.send(add_and_fail, "failing too")
    queue.send(look, "unrelated_scope")
    queue.work()
    assert found["writer"] == ["default"]
    assert found["failing"] == ["default"]
    assert is_replica(*found["failing too"])
    assert is_replica(*found["unrelated_scope"])
    scope = entered_scope()
    assert scope is None or scope.is_ambient


def test_pins_propagate_to_jobs_of_a_job(queue: Queue) -> None:
    queue.send(pass_on, "passed on")
    queue.work()
    assert found["passed on"] == ["default"]


def test_retry_reads_writes_of_the_previous_attempt(queue: Queue) -> None:
    queue.send(add_and_fail, "again", retry=True)
    queue.work()
    first, second = found["again"]
    assert is_replica(first)
    assert second == "default"


@pytest.mark.parametrize("first", [add, look], ids=["wrote", "read"])
def test_next_job_of_a_chain_reads_writes_of_the_previous(
    queue: Queue, first: Callable[[str], None]
) -> None:
    queue.send_chain(first, look)
    queue.work()
    (alias,) = found["chain"]
    assert (alias == "default") is (first is add)


def test_job_after_a_group_reads_writes_of_the_group(queue: Queue) -> None:
    """The job that wrote is not the last one of the group."""
    queue.send_group(add, look)
    queue.work()
    assert is_replica(*found["part"])
    assert found["group"] == ["default"]


def test_rq_job_after_one_whose_result_is_not_kept_reads_its_writes(valkey: str) -> None:
    """RQ deletes the first job before it enqueues the second."""
    queue = RQ(valkey)
    first = queue.jobs.enqueue(add, "first", result_ttl=0)
    queue.jobs.enqueue(look, "second", depends_on=first)
    queue.work()
    assert found["second"] == ["default"]
    queue.close()


# Jobs that run synchronously use the scope of the caller


def test_rq_job_run_synchronously(valkey: str) -> None:
    queue = RQ(valkey)
    queue.jobs._is_async = False
    with pinning_scope(isolated=True):
        queue.send(add, "x")
        assert where() == "default"
        queue.send(look, "look")
    assert found["look"] == ["default"]
    enter(None)
    queue.send(look, "unrelated_scope")
    assert is_replica(*found["unrelated_scope"])
    queue.close()


def test_huey_task_run_synchronously(valkey: str) -> None:
    queue = Huey(valkey)
    queue.huey.immediate = True
    with pinning_scope(isolated=True):
        queue.send(add, "x")
        assert where() == "default"
        queue.send(look, "look")
    assert found["look"] == ["default"]
    enter(None)
    queue.send(look, "unrelated_scope")
    assert is_replica(*found["unrelated_scope"])


# Features of the packages


def test_meta_of_the_caller_is_unchanged(valkey: str) -> None:
    from pinning_middleware.contrib.rq import META

    queue, meta = RQ(valkey), {"mine": 1}
    with pinning_scope(isolated=True):
        add("x")
        job = queue.jobs.enqueue(look, "look", meta=meta)
    assert meta == {"mine": 1}
    assert set(job.meta) == {"mine", META}
    queue.work()
    assert queue.jobs.fetch_job(job.id).meta["mine"] == 1
    queue.close()


def test_delayed_message(valkey: str) -> None:
    """dramatiq's worker enqueues it again when the delay has passed."""
    queue = Dramatiq(valkey)
    with pinning_scope(isolated=True):
        add("x")
        queue.actors[look].send_with_options(args=("later",), delay=1)
    queue.work()
    assert found["later"] == ["default"]
    queue.close()


def test_skipped_message_closes_its_scope(valkey: str) -> None:
    import dramatiq

    class Skip(dramatiq.Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            if message.args == ("skipped",):
                raise dramatiq.middleware.SkipMessage

        def before_worker_thread_shutdown(self, broker: Any, thread: Any) -> None:
            left.append(entered_scope())

    left: list[Any] = []
    queue = Dramatiq(valkey)
    queue.broker.add_middleware(Skip())
    with pinning_scope(isolated=True):
        add("x")
        queue.send(look, "skipped")
    queue.send(look, "next")
    queue.work()
    assert "skipped" not in found
    assert left == [None]
    assert is_replica(*found["next"])
    queue.close()


def test_huey_consumer(valkey: str) -> None:
    queue = Huey(valkey)
    done = threading.Event()
    queue.huey.post_execute("tell")(lambda task, value, error: done.set())
    with pinning_scope(isolated=True):
        add("x")
        queue.send(look, "look")
    consumer = queue.huey.create_consumer(workers=1, initial_delay=0.01, check_worker_health=False)
    consumer.start()
    assert done.wait(60)
    consumer.stop(graceful=True)
    assert found["look"] == ["default"]
    queue.close()
