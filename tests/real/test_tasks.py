"""Django's Tasks (Django 6) and django-tasks, with paused PostgreSQL replicas."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.cache import caches
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, transaction
from django.test import override_settings

from pinning_middleware import pinning_scope, use_primary
from pinning_middleware import tasks as carrying
from pinning_middleware.pins import PinKey
from pinning_middleware.scopes.scope import enter, entered_scope
from pinning_middleware.stores import cache as keyed
from tests.app.models import Book
from tests.conftest import Browser
from tests.real.conftest import PostgreSQL, alias_of_port, entries_of, missing, server
from tests.real.mariadb import Servers
from tests.real.sample import ROOT
from tests.valkey import pins_in, redis_cache, valkey

__all__ = ["valkey"]

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}


def module(name: str = "") -> Any:
    """Return Django's module, or that of django-tasks."""
    for package in ("django.tasks", "django_tasks"):
        if importlib.util.find_spec(package) is not None:
            return importlib.import_module(package + name)
    return missing("Tasks are missing: pip install django-tasks")


def look(*titles: str) -> list[Any]:
    seen = Book.objects.filter(title__in=titles).count() == len(titles)
    return [seen, server()]


async def alook(*titles: str) -> list[Any]:
    seen = await Book.objects.filter(title__in=titles).acount() == len(titles)
    return [seen, Book.objects.all().db]


def add(title: str) -> None:
    Book.objects.create(title=title)


def add_and_fail(title: str) -> None:
    add(title)
    raise LookupError(title)


@use_primary
def look_at_primary() -> list[Any]:
    return look()


def task(function: Callable[..., Any]) -> Any:
    return module().task(function)


@pytest.fixture(autouse=True)
def immediate(valkey: str) -> Iterator[None]:
    package = module().__name__
    backend = f"{package}.backends.immediate.ImmediateBackend"
    with (
        override_settings(TASKS={"default": {"BACKEND": backend}}, PINNING_SECONDS=600),
        pins_in(redis_cache(valkey)),
    ):
        caches["pins"].clear()
        carrying.propagate_pins()
        yield
        signals = module(".signals")
        for name in ("enqueued", "started", "finished"):
            uid = {"enqueued": "send", "started": "begin", "finished": "end"}[name]
            getattr(signals, f"task_{name}").disconnect(dispatch_uid=f"pinning_middleware.{uid}")


def write(title: str = "new") -> None:
    Book.objects.create(title=title)


class Queue:
    """A queue with a worker thread that runs enqueued tasks on demand."""

    def __init__(self) -> None:
        self.signals = module(".signals")
        self.base = module(".base")
        self._backend = module(".backends.immediate").ImmediateBackend("default", {})
        self._waiting: list[Any] = []

    def enqueue(self, function: Callable[..., Any], *args: Any) -> Any:
        """Store the task and send the signal, as a backend does."""
        result = self._result(function, args)
        self._waiting.append(result)
        self.signals.task_enqueued.send(type(self._backend), task_result=result)
        return result

    def _result(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        times = ("enqueued_at", "started_at", "last_attempted_at", "finished_at")
        return self.base.TaskResult(
            task=task(function),
            id=f"{function.__name__}-{len(self._waiting)}",
            status=self.base.TaskResultStatus.READY,
            args=list(args),
            kwargs={},
            backend="default",
            errors=[],
            worker_ids=[],
            **dict.fromkeys(times),
        )

    def work(self) -> list[Any]:
        """Run all waiting tasks; return the worker's scope after each of them."""
        left: list[Any] = []

        def run() -> None:
            for result in self._waiting:
                self._backend._execute_task(result)
                left.append(entered_scope())
            connections.close_all()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)
        return left


def test_immediate_task_reads_writes_of_the_request(
    pg: PostgreSQL, do: Callable[..., str], new_browser: Callable[..., Browser]
) -> None:
    pg.pause()
    found: list[Any] = []

    def act(request: Any) -> None:
        write()
        found.append(task(look).enqueue("new").return_value)

    new_browser().post(f"/sync/{do(act)}/")
    assert found == [[True, "pg"]]


def test_task_without_a_write_reads_a_replica(pg: PostgreSQL) -> None:
    with pinning_scope():
        seen, alias = task(look).enqueue().return_value
    assert (seen, alias in REPLICAS) == (True, True)


def test_async_task_reads_writes_of_the_request(pg: PostgreSQL) -> None:
    pg.pause()

    async def work() -> Any:
        async with pinning_scope():
            await Book.objects.acreate(title="new")
            result = await task(alook).aenqueue("new")
            return result.return_value

    assert async_to_sync(work)() == [True, "pg"]


def test_caller_reads_writes_of_an_immediate_task(pg: PostgreSQL) -> None:
    pg.pause()
    with pinning_scope():
        task(add).enqueue("in place")
        assert look("in place") == [True, "pg"]


def test_scope_ends_with_the_task(pg: PostgreSQL) -> None:
    with pinning_scope():
        before = entered_scope()
        task(add).enqueue("x")
        assert entered_scope() is before
        task(add_and_fail).enqueue("x")
        assert entered_scope() is before


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupt_inside_another() -> None:
    task(interrupt).enqueue()


@pytest.mark.parametrize("function", [interrupt, interrupt_inside_another])
def test_keyboard_interrupt_closes_the_scope(pg: PostgreSQL, function: Callable[[], None]) -> None:
    """No signal is sent at the end of such a task."""
    before = entered_scope()
    with pytest.raises(KeyboardInterrupt):
        task(function).enqueue()
    assert entered_scope() is before
    assert carrying._open == {}


def test_worker_process_loads_the_pin_from_the_cache(pg: PostgreSQL) -> None:
    pg.pause()
    queue = Queue()
    with pinning_scope():
        write()
        result = queue.enqueue(look, "new")
    assert queue.work() == [None]
    assert result.return_value == [True, "pg"]


def test_task_without_lag_reads_a_replica(pg: PostgreSQL) -> None:
    queue = Queue()
    with pinning_scope():
        write()
        result = queue.enqueue(look, "new")
    pg.wait_for()
    queue.work()
    seen, alias = result.return_value
    assert (seen, alias in REPLICAS) == (True, True)


@pytest.mark.parametrize("lost", ["no write", "emptied cache"])
def test_task_without_the_pin_reads_stale_data(pg: PostgreSQL, lost: str) -> None:
    """The second case has a cache that the processes do not share."""
    pg.pause()
    queue = Queue()
    with pinning_scope(isolated=True):
        write()
        if lost == "emptied cache":
            result = queue.enqueue(look, "new")
    if lost == "no write":
        result = queue.enqueue(look, "new")
    else:
        caches["pins"].clear()
    queue.work()
    seen, alias = result.return_value
    assert (seen, alias in REPLICAS) == (False, True)


def test_next_task_of_the_worker_is_unpinned(pg: PostgreSQL) -> None:
    pg.pause()
    queue = Queue()
    with pinning_scope(isolated=True):
        write()
        first = queue.enqueue(look, "new")
    failing = queue.enqueue(add_and_fail, "lost")
    second = queue.enqueue(look, "new")
    assert queue.work() == [None, None, None]
    assert first.return_value == [True, "pg"]
    assert len(failing.errors) == 1
    seen, alias = second.return_value
    assert (seen, alias in REPLICAS) == (False, True)


def test_task_enqueued_on_commit(pg: PostgreSQL) -> None:
    pg.pause()
    queue = Queue()
    results: list[Any] = []
    with pinning_scope():
        with transaction.atomic(using="pg"):
            write()
            transaction.on_commit(lambda: results.append(queue.enqueue(look, "new")), using="pg")
        assert keyed.load_pins("task", [results[0].id])[PinKey("pg")].position
    queue.work()
    assert results[0].return_value == [True, "pg"]


def test_decorated_task(pg: PostgreSQL) -> None:
    queue = Queue()
    result = queue.enqueue(look_at_primary)
    queue.work()
    assert result.return_value[1] == "pg"


def test_missing_task_packages_report_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(carrying, "import_module", nothing)
    with pytest.raises(ImproperlyConfigured, match="package django-tasks"):
        carrying.propagate_pins()


def test_task_enqueued_outside_a_scope_has_no_pins(pg: PostgreSQL) -> None:
    enter(None)
    queue = Queue()
    result = queue.enqueue(look)
    assert keyed.load_pins("task", [result.id]) == {}
    queue.work()


# A real worker: django-tasks-db, a process that reads its tasks from the primary


class Processes:
    """A process that enqueues and a worker, with a shared cache."""

    def __init__(self, databases: dict[str, Any], cache: str, carries: bool) -> None:
        self._environ = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.real.worker_settings",
            "WORKER_CACHE": cache,
            "WORKER_CARRIES": "1" if carries else "0",
            "WORKER_DATABASES": json.dumps(databases),
        }

    def enqueue(self, title: str, command: str = "write") -> str:
        return self._run("-m", "tests.real.queued", command, title).strip()

    def result(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._run("-m", "tests.real.queued", "result", key))
        return found

    def work(self) -> None:
        """Run all waiting tasks in a worker."""
        self._run("-m", "django", "db_worker", "--batch", "--no-startup-delay")

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.mark.parametrize("carries", [True, False], ids=["carrying", "bare"])
def test_worker_of_the_database_backend(
    pg: PostgreSQL, cluster: Any, valkey: str, carries: bool
) -> None:
    """Enqueued inside a transaction; without the pin, the worker's task is stale."""
    if importlib.util.find_spec("django_tasks_db") is None:
        missing("The database's tasks are missing: pip install django-tasks-db")
    pg.pause()
    processes = Processes(entries_of(cluster), valkey, carries)
    key = processes.enqueue("new", "atomic")
    processes.work()
    found = processes.result(key)
    assert (found["seen"], alias_of_port(found["port"]) == "pg") == (carries, carries)


def test_worker_on_servers_with_gtids(my: Servers, valkey: str) -> None:
    processes = Processes(my.entries(), valkey, carries=True)
    my.pause()
    key = processes.enqueue("new")
    processes.work()
    found = processes.result(key)
    assert (found["seen"], alias_of_port(found["port"])) == (True, "my")
    key = processes.enqueue("later")
    my.resume()
    processes.work()
    found = processes.result(key)
    assert (found["seen"], alias_of_port(found["port"]) in {"my1", "my2"}) == (True, True)
