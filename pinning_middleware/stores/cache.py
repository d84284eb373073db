"""
Pins in Django's cache, under a key: those of a user on all devices, or those of a shared object.

On Redis and Valkey the pins of parallel scopes are merged atomically by the server. On other
caches they are read, merged and written back, so that of two scopes that end at the same instant
one may win. If the cache is down or slow, its pins are lost and an error is logged, nothing else.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.core.cache import caches

from pinning_middleware.conf import conf, on_change
from pinning_middleware.pins import Pin, PinKey, Pins, live, merge_pins, pack, unpack, within_window
from pinning_middleware.stores.base import BaseStore, loaded_pins, remember_loaded
from pinning_middleware.stores.circuit_breaker import CircuitBreaker
from pinning_middleware.stores.redis_pins import lifetime, redis_pins
from pinning_middleware.stores.user_key import auser_key, user_key
from pinning_middleware.utils import clock, counters

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

# Separates users, custom keys and tasks whose keys have the same text.
Namespace: TypeAlias = Literal["user", "key", "task"]

breaker = CircuitBreaker()
on_change(breaker.reset)


# Set by the test utilities, so that tests do not share pins.
key_prefix = ""


def load_pins(namespace: Namespace, keys: Sequence[str]) -> dict[PinKey, Pin]:
    """
    Return the merged live pins of these keys, or none if the cache is unavailable or
    ``PINNING_ENABLED`` is false.
    """
    names = _names(namespace, keys)
    found: dict[PinKey, Pin] = {}
    if not conf.enabled or not breaker.allows_loads:
        return found
    with breaker.guard(), _context():
        cache, redis = caches[conf.cache], redis_pins()
        if redis is not None:
            found = redis.load([cache.make_key(name) for name in names])
        else:
            found = merge_pins(*map(unpack, cache.get_many(names).values()))
    return live(found, clock.now(), conf.seconds)


def save_pins(
    namespace: Namespace, keys: Sequence[str], pins: Pins, forget: Pins | None = None
) -> None:
    """Merge pins into those of each key, and remove those of `forget` that did not change."""
    names = _names(namespace, keys)
    if not breaker.allows_saves:
        if pins:
            counters.pin_events["lost"] += 1
        return
    pins = within_window(pins, clock.now())
    with breaker.guard(), _counting_lost(pins), _context():
        cache, redis = caches[conf.cache], redis_pins()
        for name in names:
            if redis is not None:
                redis.save(cache.make_key(name), pins, forget or {})
            else:
                merged = _merged(cache.get(name), pins, forget or {})
                cache.set(name, pack(merged), lifetime(merged))


@contextmanager
def _counting_lost(pins: Pins) -> Iterator[None]:
    """Count pins that a cache does not accept, one that is full and evicts nothing for example."""
    try:
        yield
    except Exception:
        if pins:
            counters.pin_events["lost"] += 1
        raise


def _merged(row: Any, pins: Pins, forget: Pins) -> dict[PinKey, Pin]:
    known = unpack(row) if row else {}
    # Packing rounds, so compare packed values.
    forgotten = unpack(pack(forget))
    kept = {key: pin for key, pin in known.items() if forgotten.get(key) != pin}
    return merge_pins(kept, pins)


def check_keys(keys: Iterable[object]) -> None:
    """Raise TypeError for a key that is not text, ValueError if it is empty or not UTF-8."""
    for key in keys:
        if not isinstance(key, str):
            raise TypeError(f"a key must be text, not {key!r}: use str({key!r})")
        if not key:
            raise ValueError("a key must not be empty")
        try:
            key.encode()
        except UnicodeEncodeError:
            raise ValueError(f"a key must be encodable as UTF-8, not {key!r}") from None


def _names(namespace: Namespace, keys: Sequence[str]) -> list[str]:
    check_keys(keys)
    # Any text is a key, but memcached allows neither blanks nor more than 250 bytes.
    return [
        "pinning:" + hashlib.sha256(f"{key_prefix}{namespace}\0{key}".encode()).hexdigest()[:40]
        for key in keys
    ]


# Set by the app: the context in which a cache in the database is used, whose queries are not part
# of the scope.
db_cache_context: Callable[[], AbstractContextManager[None]] = nullcontext


def _context() -> AbstractContextManager[None]:
    database = sys.modules.get("django.core.cache.backends.db")
    if database is not None and isinstance(caches[conf.cache], database.DatabaseCache):
        return db_cache_context()
    return nullcontext()


class CacheStore(BaseStore):
    """
    Pins a user on every device, through the cache PINNING_CACHE and under PINNING_USER_KEY.

    A request without a key causes no cache lookup.
    """

    after_authentication = True

    def load(self, request: HttpRequest) -> Pins:
        key = _last_key(request, _key(request))
        return remember_loaded(request, self, load_pins("user", [key]) if key is not None else {})

    def save(self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins) -> None:
        # Evaluate the key again: this request may have logged the user in or out.
        if (key := _last_key(request, _key(request))) is not None:
            save_pins("user", [key], pins, self._ended(request, pins))

    async def aload(self, request: HttpRequest) -> Pins:
        key = _last_key(request, await _akey(request))
        pins = await sync_to_async(load_pins)("user", [key]) if key is not None else {}
        return remember_loaded(request, self, pins)

    async def asave(
        self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins
    ) -> None:
        if (key := _last_key(request, await _akey(request))) is not None:
            await sync_to_async(save_pins)("user", [key], pins, self._ended(request, pins))

    def _ended(self, request: HttpRequest, pins: Pins) -> Pins:
        """Return the loaded pins that `unpin_this_request()` has ended."""
        return {key: pin for key, pin in loaded_pins(request, self).items() if key not in pins}


def _last_key(request: HttpRequest, key: str | None) -> str | None:
    """Return the last key of a request that was not None: that of a user who has logged out."""
    if key is not None:
        request.__dict__["_pinning_key"] = key
    return request.__dict__.get("_pinning_key")


def _key(request: HttpRequest) -> str | None:
    if iscoroutinefunction(conf.key):
        return cast("str | None", async_to_sync(conf.key)(request))
    return conf.key(request)


async def _akey(request: HttpRequest) -> str | None:
    if conf.key is user_key:
        return await auser_key(request)
    if iscoroutinefunction(conf.key):
        return await conf.key(request)  # type: ignore[no-any-return]
    return await sync_to_async(conf.key)(request)
