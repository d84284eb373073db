"""Isolation of the pins that tests leave in the cache and in their thread."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from pinning_middleware.scopes.scope import enter, entered_scope
from pinning_middleware.stores import cache


@contextmanager
def isolated_pins() -> Iterator[None]:
    """
    Hide the pins that other tests have left in the cache, and those of their thread: what a test
    writes outside any request pins the thread for the window.

    ``CacheStore`` keeps a pin under the user's ID. A later test, or the next run, may create a user
    with the same ID and would read from the primary. Inside this context, keys in the cache have a
    random prefix. The prefix belongs to this process: a worker in another process uses other keys.
    """
    previous, outer = cache.key_prefix, entered_scope()
    cache.key_prefix = f"{secrets.token_hex(8)}\0"
    if outer is not None and outer.is_ambient:
        enter(None)
    try:
        yield
    finally:
        cache.key_prefix = previous
        if outer is None or outer.is_ambient:
            enter(outer)
