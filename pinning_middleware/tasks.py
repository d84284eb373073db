"""
Django's Tasks (Django 6) and django-tasks: a task that is enqueued after a write reads that write.

The interface has no headers, so the pins are kept in the cache ``PINNING_CACHE`` under the task's
ID. Limits:

- All processes have to share the cache (Redis, Valkey, memcached, a database). Otherwise, or while
  the cache is unavailable, a task begins without pins.
- The signal is sent after the task was passed to its backend. A worker that starts the task at once
  may find no pins. A backend that keeps its tasks in the primary hides them until the transaction
  commits; enqueue inside ``transaction.atomic()`` there.
- A task that starts after the cache entry has expired begins without pins.
- The worker of django-tasks-db opens a transaction on the database for reads and locks a row in the
  database for writes, so both must be the primary. Set
  ``PINNING_PRIMARY_MODELS = ["django_tasks_database"]``.
- Tasks have no policy. Decorate the function with ``use_primary`` instead.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from contextvars import ContextVar
from importlib import import_module
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from pinning_middleware import handoff
from pinning_middleware.scope_blocks import PinningScope

__all__ = ["propagate_pins"]

# Open scopes by the ID of their task, with the ID of the task around it.
_open: dict[str, tuple[PinningScope, str | None]] = {}
_running: ContextVar[str | None] = ContextVar("pinning_task", default=None)


def propagate_pins() -> None:
    """
    Propagate pins to tasks.

    Call it in ``AppConfig.ready()``, in processes that enqueue tasks and in workers. Raise
    ImproperlyConfigured if neither Django 6 nor django-tasks is installed.
    """
    is_available = False
    for package in ("django.tasks", "django_tasks"):
        with suppress(ImportError):
            _connect(import_module(f"{package}.signals"))
            _close_scope_on_interrupt(import_module(f"{package}.base").Task)
            is_available = True
    if not is_available:
        raise ImproperlyConfigured("Tasks require Django 6 or the package django-tasks.")


def _connect(signals: Any) -> None:
    signals.task_enqueued.connect(_save_pins, dispatch_uid="pinning_middleware.send")
    signals.task_started.connect(_open_scope, dispatch_uid="pinning_middleware.begin")
    signals.task_finished.connect(_close_scope, dispatch_uid="pinning_middleware.end")


def _save_pins(*, task_result: Any, **kwargs: Any) -> None:
    handoff.save_pins_to_send(task_result.id)


def _open_scope(*, task_result: Any, **kwargs: Any) -> None:
    block = handoff.task_scope(handoff.load_pins(task_result.id))
    block.__enter__()
    _open[task_result.id] = block, _running.get()
    _running.set(task_result.id)


def _close_scope(*, task_result: Any, **kwargs: Any) -> None:
    _close(task_result.id)


def _close(task: str | None) -> None:
    if task is None or (entry := _open.pop(task, None)) is None:
        return
    block, outer = entry
    _running.set(outer)
    block.__exit__(None, None, None)


def _close_scope_on_interrupt(kind: Any) -> None:
    """Close the scope of a task on Ctrl-C, for which no ``task_finished`` is sent."""
    call = kind.call
    if hasattr(call, "pinning_original"):
        return

    @functools.wraps(call)
    def closing(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except KeyboardInterrupt:
            _close(_running.get())
            raise

    closing.pinning_original = call  # type: ignore[attr-defined]
    kind.call = closing
