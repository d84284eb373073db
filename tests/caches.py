"""Cache backends for tests."""

from __future__ import annotations

from collections import Counter
from typing import Any

from django.core.cache.backends.locmem import LocMemCache
from redis import ConnectionPool

calls: Counter[str] = Counter()


class CountingCache(LocMemCache):
    """A backend that counts calls."""

    def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        calls["get"] += 1
        return super().get(key, *args, **kwargs)

    def set(self, key: str, *args: Any, **kwargs: Any) -> None:
        calls["set"] += 1
        super().set(key, *args, **kwargs)


class NamedPool(ConnectionPool):
    """A connection pool with a custom constructor, like Sentinel's."""

    def __init__(self, *, service: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.service = service
