"""Background work in a thread, which reads the writes of its request."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from secrets import token_urlsafe

from django.core.cache import cache
from django.db import connections

from pinning_middleware import propagate_scope
from sample_site.panel.recording import Recording

from .models import Message

KEPT_SECONDS = 300
executor = ThreadPoolExecutor(2, "count")


@dataclass(frozen=True)
class Count:
    """The result of a task, empty until it has finished."""

    messages: int | None = None
    read_from: tuple[str, ...] = ()


def count_later(author: int) -> str:
    """Count the user's messages in a thread; return the key of the result."""
    key = token_urlsafe(12)
    keep(key, Count())
    # Without propagate_scope() the thread would not know of the write, and use any replica.
    executor.submit(propagate_scope(count), key, author)
    return key


def count(key: str, author: int) -> None:
    """Count, and record the database of the read."""
    recording = Recording("task", "count")
    try:
        with recording.watch_all():
            messages = Message.objects.filter(author=author).count()
        keep(key, Count(messages, tuple(recording.read_from)))
    finally:
        connections.close_all()


def keep(key: str, count: Count) -> None:
    """Store a result for the page."""
    cache.set(f"count:{key}", count, KEPT_SECONDS)


def result(key: str) -> Count | None:
    """Return the result of the task, empty for an unknown key."""
    found = cache.get(f"count:{key}") if key else None
    return found if isinstance(found, Count) else None
