"""Packages that change how Celery sends or runs tasks; ``tests/real`` has workers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, Task
from celery._state import _task_stack
from celery.exceptions import Retry
from celery.signals import task_postrun, task_prerun
from django.core import checks
from django.core.cache import caches
from django.test import override_settings

from pinning_middleware import celery as adapter
from pinning_middleware import handoff, pinning_scope
from tests.app.models import Account, Book
from tests.conftest import is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app with an in-memory broker and without a worker."""
    before = set(checks.registry.registry.registered_checks)
    found = Celery("tests", broker="memory://", set_as_current=False)
    adapter.propagate_pins(found)
    yield found
    checks.registry.registry.registered_checks.intersection_update(before)


def token_of_a_write(model: Any = Book, using: str = "default") -> str:
    with pinning_scope(isolated=True) as scope:
        model.objects.using(using).create(**{"name" if model is Account else "title": "new"})
    return str(scope.token)


# celery-batches


@pytest.fixture
def batch(app: Celery) -> Any:
    """Return a function that runs a batch of messages, and returns the aliases of its reads."""
    if sys.version_info >= (3, 12):
        pytest.skip("celery-batches refuses the Celery that is tested with this Python")
    import celery_batches as package
    from celery_batches.trace import apply_batches_task

    found: list[str] = []

    @app.task(base=package.Batches, name="tests.batch", shared=False)
    def task(requests: Any) -> None:
        found.extend([where("Book"), where("Account")])

    def run(*tokens: str | None) -> list[str]:
        found.clear()
        requests = [
            package.SimpleRequest(
                **dict.fromkeys(("id", "name", "delivery_info", "hostname", "ignore_result")),
                **dict.fromkeys(("reply_to", "correlation_id")),
                args=(),
                kwargs={},
                request_dict={} if token is None else {adapter.HEADER: token},
            )
            for token in tokens
        ]
        apply_batches_task(task, (requests,), 0, None)
        return list(found)

    return run


def test_batch_begins_with_the_pins_of_all_its_messages(batch: Any) -> None:
    pools = {"default": ["replica1", "replica2"], "users": ["users_replica"]}
    routers = ["pinning_middleware.routers.PinningRouter", "tests.app.routers.UsersRouter"]
    with override_settings(PINNING_REPLICAS=pools, DATABASE_ROUTERS=routers):
        book, account = token_of_a_write(), token_of_a_write(Account, "users")
        assert batch(None, book, "forged", account) == ["default", "users"]
        alias, account_alias = batch(None, account)
        assert (is_replica(alias), account_alias) == (True, "users")


def test_batch_without_pins_reads_a_replica(batch: Any) -> None:
    token_of_a_write()
    assert is_replica(batch(None, None)[0])


# celery-singleton


class Locks:
    """The backend of celery-singleton, in memory."""

    def __init__(self) -> None:
        self.tasks: dict[str, str] = {}

    def get(self, lock: str) -> str | None:
        return self.tasks.get(lock)

    def lock(self, lock: str, task_id: str, expiry: int | None = None) -> bool:
        # As by Redis, the lock is not acquired again by its own task.
        return lock not in self.tasks and self.tasks.setdefault(lock, task_id) == task_id

    def unlock(self, lock: str) -> None:
        self.tasks.pop(lock, None)


@pytest.fixture
def single(app: Celery) -> Any:
    import celery_singleton as package

    @app.task(base=package.Singleton, name="tests.single", shared=False)
    def task(number: int) -> None:
        pass

    task._singleton_backend = Locks()
    yield task
    caches["default"].clear()


def alias_read_by(task: Any, **request: Any) -> str:
    """Return the alias that a task reads from, when a worker runs it."""
    task.push_request(**request)
    try:
        task_prerun.send(sender=task, task_id=request["id"], task=task, args=(), kwargs={})
        alias = where()
        task_postrun.send(sender=task, task_id=request["id"], task=task, args=(), kwargs={})
        return alias
    finally:
        task.pop_request()


def test_waiting_singleton_inherits_the_pins_of_dropped_calls(single: Any) -> None:
    first = single.delay(1)
    with pinning_scope(isolated=True):
        Book.objects.create(title="new")
        assert single.delay(1).id == first.id
    assert alias_read_by(single, id=first.id) == "default"
    assert is_replica(alias_read_by(single, id="another"))


def test_singleton_that_is_requeued_is_sent_again(
    single: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(Task, "apply_async", lambda *args, **options: sent.append(options) or True)
    single.apply_async((1,), task_id="1")
    monkeypatch.setattr(handoff, "has_caught_up", lambda: False)
    single.push_request(id="1", args=(1,), kwargs={}, called_directly=False)
    try:
        with pytest.raises(Retry):
            adapter._requeue_unless_caught_up(single, (1,), {})
    finally:
        single.pop_request()
    assert [options["task_id"] for options in sent] == ["1", "1"]


def test_dropped_call_without_pins_saves_none(single: Any) -> None:
    first = single.delay(1)
    single.delay(1)
    assert handoff.load_pins(first.id) == {}


def test_propagate_pins_wraps_singletons_once(app: Celery) -> None:
    import celery_singleton as package

    before = package.Singleton.on_duplicate
    adapter.propagate_pins(app)
    assert package.Singleton.on_duplicate is before


# Options and messages


@pytest.mark.parametrize("options", [{"pinning_wait": "5"}, {"pinning_retries": 1.5}])
def test_task_with_an_invalid_option_reads_the_primary_and_is_reported(
    app: Celery, options: dict[str, Any]
) -> None:
    @app.task(name="tests.invalid", shared=False, pinning="wait", **options)
    def task() -> None:
        pass

    assert alias_read_by(task, id="1", is_eager=False) == "default"
    (found,) = [each for each in checks.run_checks(tags=["pinning"]) if "tests.invalid" in each.msg]
    assert found.id == "pinning_middleware.E101"


def test_message_of_a_chord_has_a_token_whatever_the_arguments_are(app: Celery) -> None:
    """An argument may be named like the name of a task."""

    @app.task(name="tests.part", shared=False)
    def task() -> None:
        pass

    body = {"task": "tests.body", "kwargs": {"task": ["of", "the", "site"]}}
    task.push_request(id="1", chord=body)
    _task_stack.push(task)
    headers: dict[str, Any] = {}
    try:
        adapter._add_token("tests.body", headers)
    finally:
        _task_stack.pop()
        task.pop_request()
    assert adapter.HEADER in headers


def test_task_is_extended_although_another_library_has_wrapped_its_method(
    monkeypatch: pytest.MonkeyPatch, app: Celery
) -> None:
    original = Task.before_start.pinning_original

    @functools.wraps(original)
    def before_start(*args: Any) -> None:
        original(*args)

    monkeypatch.setattr(Task, "before_start", before_start)
    adapter.propagate_pins(app)
    assert Task.before_start.pinning_original is before_start
