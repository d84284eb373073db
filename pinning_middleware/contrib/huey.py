"""
huey: a task that is enqueued after a write reads that write.

Add the mixin to the class of the instance, for senders and the consumer::

    class Huey(PinnedHuey, RedisHuey):
        pass

    huey = Huey("shop", url=...)
    HUEY = {"huey_class": "shop.queues.Huey"}    # huey.contrib.djhuey's setting

Messages of huey have no headers, so the pins are kept in the cache ``PINNING_CACHE`` under the
task's ID. All processes must share that cache (Redis, Valkey, memcached, a database); see
``pinning_middleware.tasks`` for the limits. In the consumer, each task runs in a scope of its own.
Its retries, the next task (``then``) and the callback of a chord inherit its outgoing pins.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from pinning_middleware import handoff

__all__ = ["PinnedHuey"]

_running: ContextVar[Any] = ContextVar("pinning_huey_task", default=None)


class PinnedHuey:
    """A mixin for a huey class whose tasks propagate pins."""

    def enqueue(self, task: Any) -> Any:
        # Groups and chords have no ID; their tasks are enqueued one by one.
        if hasattr(task, "id"):
            others = [handoff.pins_of_all_writes()] if _is_chord_callback(task) else []
            handoff.save_pins_to_send(task.id, *others)
        return super().enqueue(task)  # type: ignore[misc]

    def add_schedule(self, task: Any) -> Any:
        # A retry with a delay is enqueued by the scheduler, outside of any scope.
        if _running.get() is task:
            handoff.save_pins_to_send(task.id)
        return super().add_schedule(task)  # type: ignore[misc]

    def execute(self, task: Any, timestamp: Any = None) -> Any:
        with handoff.task_scope(handoff.load_pins(task.id)):
            before = _running.get()
            _running.set(task)
            try:
                return super().execute(task, timestamp)  # type: ignore[misc]
            finally:
                _running.set(before)


def _is_chord_callback(task: Any) -> bool:
    """Return whether this is the callback of a chord whose last task is running now."""
    member = _running.get()
    while member is not None:
        # New in huey 3.
        chord = getattr(member, "chord_config", None)
        if chord is not None and chord.callback.id == task.id:
            return True
        member = member.on_complete
    return False
