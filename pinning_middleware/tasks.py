"""
Django's Tasks (Django 6) and django-tasks: a task that is enqueued after a write reads that write.

Their interface has no room for headers, so the pins wait in the cache ``PINNING_CACHE`` under the
task's id. What that can't do:

- Without a cache that all processes share (Redis, Valkey, memcached, a database) a worker finds
  nothing, and reads as if nobody had written; so it does while that cache is down.
- The signal comes after the task was handed to its backend: a worker that starts it within that
  instant finds no pin. A backend that keeps its tasks in the primary hides them until the
  transaction commits; enqueue inside ``transaction.atomic()`` there.
- A task that is enqueued for later than ``PINNING_SECONDS`` finds no pin any more; by then
  only a replica that lags as much would be stale.
- The worker of django-tasks-db opens a transaction where reads go and locks where writes go, so
  it fails under every router with replicas. Let a router before this package's one send the reads
  of the app ``django_tasks_database`` to the primary.
- A task says no policy of its own; ``use_primary`` decorates its function as any other.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from contextvars import ContextVar
from importlib import import_module
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from pinning_middleware.routing.outgoing import outgoing_pins
from pinning_middleware.scope_blocks import PinningScope
from pinning_middleware.scopes.scope import Scope, entered_scope
from pinning_middleware.stores import cache

__all__ = ["propagate_pins"]

# By their ids, the scopes of tasks that run, each with the task that ran around it.
_open: dict[str, tuple[PinningScope, str | None]] = {}
_running: ContextVar[str | None] = ContextVar("pinning_task", default=None)


def propagate_pins() -> None:
    """
    Let tasks carry pins. Call it in an app's ``ready()``, where tasks are enqueued and in the
    worker. ``ImproperlyConfigured`` where there is neither Django 6 nor django-tasks.
    """
    found = False
    for package in ("django.tasks", "django_tasks"):
        with suppress(ImportError):
            _connect(import_module(f"{package}.signals"))
            _close_interrupted(import_module(f"{package}.base").Task)
            found = True
    if not found:
        raise ImproperlyConfigured("Tasks are part of Django 6; before it, install django-tasks.")


def _connect(signals: Any) -> None:
    signals.task_enqueued.connect(_send, dispatch_uid="pinning_middleware.send")
    signals.task_started.connect(_begin, dispatch_uid="pinning_middleware.begin")
    signals.task_finished.connect(_end, dispatch_uid="pinning_middleware.end")


def _send(*, task_result: Any, **kwargs: Any) -> None:
    scope = entered_scope()
    if scope is not None and (pins := outgoing_pins(scope)):
        cache.keep("task", [task_result.id], pins)


def _begin(*, task_result: Any, **kwargs: Any) -> None:
    scope = Scope.of(cache.fetch("task", [task_result.id]))
    outer = entered_scope()
    # One that runs in place is part of who called it; a worker serves strangers by turns.
    block = PinningScope(scope=scope, isolated=outer is None or outer.is_lasting)
    block.__enter__()
    _open[task_result.id] = block, _running.get()
    _running.set(task_result.id)


def _end(*, task_result: Any, **kwargs: Any) -> None:
    _close(task_result.id)


def _close(task: str | None) -> None:
    if task is None or (found := _open.pop(task, None)) is None:
        return
    block, outer = found
    _running.set(outer)
    block.__exit__(None, None, None)


def _close_interrupted(kind: Any) -> None:
    """Close the scope of a task that Ctrl-C ends: of that one nobody says that it has finished."""
    call = kind.call
    if getattr(call, "_pinning", False):
        return

    @functools.wraps(call)
    def closing(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except KeyboardInterrupt:
            _close(_running.get())
            raise

    closing._pinning = True  # type: ignore[attr-defined]
    kind.call = closing
