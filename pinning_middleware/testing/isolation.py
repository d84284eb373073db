"""Isolation of the pins that tests leave in the cache."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from pinning_middleware.stores import cache


@contextmanager
def isolated_pins() -> Iterator[None]:
    """
    Hide the pins that other tests have left in the cache.

    ``CacheStore`` keeps a pin under the user's ID. A later test, or the next run, may create a user
    with the same ID and would read from the primary. Inside this context, keys in the cache have a
    random prefix. The prefix belongs to this process: a worker in another process uses other keys.
    """
    previous = cache.key_prefix
    cache.key_prefix = f"{secrets.token_hex(8)}\0"
    try:
        yield
    finally:
        cache.key_prefix = previous
