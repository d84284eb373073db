"""Work in the background, in a thread: it reads what the request that asked for it wrote."""

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
    """What a task found; before it has, nothing."""

    messages: int | None = None
    read_from: tuple[str, ...] = ()


def count_later(author: int) -> str:
    """Let a thread count the user's messages; the key of the result."""
    key = token_urlsafe(12)
    keep(key, Count())
    # Without it the thread would know of no write, and ask any replica.
    executor.submit(propagate_scope(count), key, author)
    return key


def count(key: str, author: int) -> None:
    """Count, and note who was asked."""
    recording = Recording("task", "count")
    try:
        with recording.watch_all():
            messages = Message.objects.filter(author=author).count()
        keep(key, Count(messages, tuple(recording.read_from)))
    finally:
        connections.close_all()


def keep(key: str, count: Count) -> None:
    """Keep a result for the page that asks for it."""
    cache.set(f"count:{key}", count, KEPT_SECONDS)


def result(key: str) -> Count | None:
    """Return what the task has found so far; nothing for a key that is unknown."""
    found = cache.get(f"count:{key}") if key else None
    return found if isinstance(found, Count) else None
