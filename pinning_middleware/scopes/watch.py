"""What ran while a function ran: reads of a pool, and writes to any database."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar


class Watch(AbstractContextManager["Watch"]):
    """A context manager that records what runs inside it, also in its threads and tasks."""

    def __init__(self) -> None:
        self.has_written = False
        # The alias and the reason of each read.
        self.routes: set[tuple[str, str]] = set()
        self.outer: Watch | None = None

    def __enter__(self) -> Watch:
        self.outer = _watch.get()
        _watch.set(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _watch.set(self.outer)


_watch: ContextVar[Watch | None] = ContextVar("pinning_watch", default=None)


current_watch = _watch.get
set_watch = _watch.set


def note_read(route: tuple[str, str]) -> None:
    """Record the alias and the reason of a read in the active watches."""
    watch = _watch.get()
    while watch is not None:
        watch.routes.add(route)
        watch = watch.outer


def note_write() -> None:
    """Record in the active watches that a write is about to run."""
    watch = _watch.get()
    while watch is not None:
        watch.has_written = True
        watch = watch.outer
