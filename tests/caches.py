"""Cache backends for tests: they count calls or have async methods."""

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


class AsyncCache(LocMemCache):
    """An in-process cache that async code can use without a thread."""

    async def aget(self, *args: Any, **kwargs: Any) -> Any:
        calls["aget"] += 1
        return self.get(*args, **kwargs)

    async def aget_many(self, *args: Any, **kwargs: Any) -> Any:
        calls["aget_many"] += 1
        return self.get_many(*args, **kwargs)

    async def aset(self, *args: Any, **kwargs: Any) -> None:
        calls["aset"] += 1
        self.set(*args, **kwargs)
