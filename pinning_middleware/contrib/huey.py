"""
huey: a task that is enqueued after a write reads that write.

Mix the class in where the instance is made, for those who enqueue and for the consumer::

    class Huey(PinnedHuey, RedisHuey):
        pass

    huey = Huey("shop", url=...)
    HUEY = {"huey_class": "shop.queues.Huey"}    # huey.contrib.djhuey's setting

Its messages have no room for headers, so the pins wait in the cache ``PINNING_CACHE`` under the
task's id, which all processes have to share (Redis, Valkey, memcached, a database): see
``pinning_middleware.tasks`` for what that can't do. In the consumer each task is a scope; its
retries, what follows it (``then``) and the callback of a chord begin with what it has left behind.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from pinning_middleware.pins import merge_pins
from pinning_middleware.routing.outgoing import outgoing_pins, pin_of_now
from pinning_middleware.routing.pools import pools
from pinning_middleware.scope_blocks import PinningScope
from pinning_middleware.scopes.scope import Scope, entered_scope
from pinning_middleware.stores import cache

__all__ = ["PinnedHuey"]

_running: ContextVar[Any] = ContextVar("pinning_huey_task", default=None)


class PinnedHuey:
    """Before a class of huey's: its tasks carry pins."""

    def enqueue(self, task: Any) -> Any:
        # Groups and chords come back here one by one.
        if hasattr(task, "id"):
            scope = entered_scope()
            pins = outgoing_pins(scope) if scope is not None else {}
            if _ends_chord(task):
                # Its members are done, each in a scope of its own.
                now = {pool.primary: pin_of_now(pool) for pool in pools().by_primary.values()}
                pins = merge_pins(pins, now)
            if pins:
                cache.keep("task", [task.id], pins)
        return super().enqueue(task)  # type: ignore[misc]

    def execute(self, task: Any, timestamp: Any = None) -> Any:
        outer = entered_scope()
        scope = Scope.of(cache.fetch("task", [task.id]))
        # One that runs in place is part of who called it; a consumer serves strangers by turns.
        is_alone = outer is None or outer.is_lasting
        with PinningScope(scope=scope, isolated=is_alone):
            before = _running.get()
            _running.set(task)
            try:
                return super().execute(task, timestamp)  # type: ignore[misc]
            finally:
                _running.set(before)


def _ends_chord(task: Any) -> bool:
    """Return whether this is the callback of a chord whose last member runs now."""
    member = _running.get()
    while member is not None:
        # What came with huey 3.
        chord = getattr(member, "chord_config", None)
        if chord is not None and chord.callback.id == task.id:
            return True
        member = member.on_complete
    return False
