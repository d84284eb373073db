"""Whether anything was written while a function ran: to any database, also if it pins nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar

__all__ = ["WriteWatch", "is_watching", "note_write"]


class WriteWatch(AbstractContextManager["WriteWatch"]):
    """A block that notes whether a write ran inside it. Threads and tasks of the block count."""

    def __init__(self) -> None:
        self.has_written = False
        self.outer: WriteWatch | None = None

    def __enter__(self) -> WriteWatch:
        self.outer = _watch.get()
        _watch.set(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _watch.set(self.outer)


_watch: ContextVar[WriteWatch | None] = ContextVar("pinning_write_watch", default=None)


def is_watching() -> bool:
    """Return whether a block is open that asks for writes."""
    return _watch.get() is not None


def note_write() -> None:
    """Tell the open blocks that a write is about to run."""
    watch = _watch.get()
    while watch is not None:
        watch.has_written = True
        watch = watch.outer
