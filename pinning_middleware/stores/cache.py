"""
Pins under a key, in Django's cache: a user's on all devices, or those of a thing that many read.

On Redis and Valkey the pins of parallel scopes merge atomically, on the server. On other caches
they are read, merged and written back, so that of two scopes that end at the same instant one may
win. A cache that is down or slow costs what it would have told, and a line in the log.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.contrib.auth import SESSION_KEY
from django.core.cache import BaseCache, caches
from django.db import InterfaceError, OperationalError
from django.utils.functional import empty

from pinning_middleware.conf import conf, on_change
from pinning_middleware.pins import Pin, Pins, live, merge_pins, pack, unpack
from pinning_middleware.stores.base import BaseStore, loaded, remember
from pinning_middleware.utils import clock
from pinning_middleware.utils.logging import log_rate_limited

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

__all__ = [
    "CacheStore",
    "afetch",
    "akeep",
    "auser_key",
    "check_keys",
    "fetch",
    "keep",
    "user_key",
]

# Whose key it is, so that a user's can't be an order's.
Kind: TypeAlias = Literal["user", "key", "task"]

logger = logging.getLogger("pinning_middleware.pins")

# Seconds: what a look-up may take on Redis and Valkey, and how slow any other cache may be
# before it is left alone for PINNING_RETRY_AFTER.
LONGEST = 0.5

# Every field is a number that only grows, so merging is the larger of two. They are compared as
# text, since Lua's numbers are exact to 2^53 only and a position may be larger.
_MERGE = """
local longest = redis.call('PTTL', KEYS[1])
for i = 2, #ARGV, 2 do
    local known = redis.call('HGET', KEYS[1], ARGV[i])
    local new = ARGV[i + 1]
    if not known or #new > #known or (#new == #known and new > known) then
        redis.call('HSET', KEYS[1], ARGV[i], new)
    end
end
if tonumber(ARGV[1]) > longest then
    redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
"""
# Only what is still as it was read: a newer write's pin stays. When each log's window ends is not
# compared, since a pin tells the latest of them only; a newer write moves a point anyway.
_FORGET = """
for i = 1, #ARGV, 2 do
    if not string.find(ARGV[i], '|to|', 1, true)
            and redis.call('HGET', KEYS[1], ARGV[i]) ~= ARGV[i + 1] then
        return 0
    end
end
for i = 1, #ARGV, 2 do
    redis.call('HDEL', KEYS[1], ARGV[i])
end
return 1
"""


def fetch(kind: Kind, keys: Sequence[str]) -> dict[str, Pin]:
    """Return the merged live pins of these keys; none where the cache does not answer."""
    found: dict[str, Pin] = {}
    names = _names(kind, keys)
    if _bounded.is_out:
        return found
    with _bounded(), _around():
        cache = caches[conf.cache]
        client = _redis(cache)
        if client is None:
            rows: Iterable[Any] = cache.get_many(names).values()
            found = merge_pins(*map(unpack, rows))
        else:
            pipeline = client.pipeline(transaction=False)
            for name in names:
                pipeline.hgetall(cache.make_key(name))
            found = merge_pins(*map(_from_fields, pipeline.execute()))
    return live(found, clock.now())


async def afetch(kind: Kind, keys: Sequence[str]) -> dict[str, Pin]:
    """Return ``fetch(kind, keys)`` through the cache's async interface."""
    cache = caches[conf.cache]
    if _is_redis(cache):
        return await sync_to_async(fetch)(kind, keys)
    found: dict[str, Pin] = {}
    names = _names(kind, keys)
    if _bounded.is_out:
        return found
    with _bounded(), _around():
        rows = (await cache.aget_many(names)).values()
        found = merge_pins(*map(unpack, rows))
    return live(found, clock.now())


def keep(kind: Kind, keys: Sequence[str], pins: Pins, gone: Pins | None = None) -> None:
    """
    Merge pins into those of each key. ``gone``: pins to forget, unless they have moved since they
    were read.
    """
    names = _names(kind, keys)
    if _bounded.is_out:
        return
    pins = live(pins, clock.now())
    with _bounded(), _around():
        cache = caches[conf.cache]
        client = _redis(cache)
        for name in names:
            if client is not None:
                _keep_on_redis(client, cache.make_key(name), pins, gone or {})
            else:
                merged = _merged(cache.get(name), pins, gone or {})
                cache.set(name, pack(merged), _timeout(merged))


async def akeep(kind: Kind, keys: Sequence[str], pins: Pins, gone: Pins | None = None) -> None:
    """Do ``keep`` through the cache's async interface."""
    cache = caches[conf.cache]
    if _is_redis(cache):
        await sync_to_async(keep)(kind, keys, pins, gone)
        return
    names = _names(kind, keys)
    if _bounded.is_out:
        return
    pins = live(pins, clock.now())
    with _bounded(), _around():
        for name in names:
            merged = _merged(await cache.aget(name), pins, gone or {})
            await cache.aset(name, pack(merged), _timeout(merged))


def _merged(row: Any, pins: Pins, gone: Pins) -> dict[str, Pin]:
    known = unpack(row) if row else {}
    # As they were written down, since that rounds.
    forgotten = unpack(pack(gone))
    kept = {alias: pin for alias, pin in known.items() if forgotten.get(alias) != pin}
    return merge_pins(kept, pins)


def _timeout(pins: Pins) -> int:
    """Return for how long these pins are of use, in whole seconds; 0: not at all."""
    return max((math.ceil(pin.until - clock.now()) for pin in pins.values()), default=0)


def check_keys(keys: Iterable[object]) -> None:
    """Raise ``TypeError`` or ``ValueError`` for a key that is no text, or none that can be sent."""
    for key in keys:
        if not isinstance(key, str):
            raise TypeError(f"a key must be text, not {key!r}: use str({key!r})")
        if not key:
            raise ValueError("a key must not be empty")
        try:
            key.encode()
        except UnicodeEncodeError:
            raise ValueError(f"a key must be text that UTF-8 can say, not {key!r}") from None


def _names(kind: Kind, keys: Sequence[str]) -> list[str]:
    check_keys(keys)
    # Whatever the key is made of, memcached too has to like it.
    return ["pinning:" + hashlib.sha256(f"{kind}\0{key}".encode()).hexdigest()[:40] for key in keys]


# Set by the app: what a cache in the database runs in, which is no part of what a user does.
around: Callable[[], AbstractContextManager[None]] = nullcontext


def _around() -> AbstractContextManager[None]:
    database = sys.modules.get("django.core.cache.backends.db")
    if database is not None and isinstance(caches[conf.cache], database.DatabaseCache):
        return around()
    return nullcontext()


# Redis and Valkey


def _is_redis(cache: BaseCache) -> bool:
    return _client_of(cache) is not None


def _client_of(cache: BaseCache) -> Callable[[], Any] | None:
    """Return what gives a client of the writing server: of Django's backend or of django-redis."""
    for name in ("_cache", "client"):
        get_client = getattr(getattr(cache, name, None), "get_client", None)
        if get_client is not None:
            return functools.partial(get_client, write=True)
    return None


_clients: dict[str, Any] = {}


def _redis(cache: BaseCache) -> Any:
    """Return a client whose calls are bounded, ``None`` where the cache is not Redis or Valkey."""
    if (given := _client_of(cache)) is None:
        return None
    if conf.cache not in _clients:
        pool = given().connection_pool
        bounds = {"socket_timeout": LONGEST, "socket_connect_timeout": LONGEST}
        chosen = {
            name: value for name, value in pool.connection_kwargs.items() if value is not None
        }
        try:
            own = type(pool)(connection_class=pool.connection_class, **{**bounds, **chosen})
        except TypeError:
            # One that is made in its own way, for Sentinel say: what the site chose bounds it.
            own = pool
        _clients[conf.cache] = type(given())(connection_pool=own)
    return _clients[conf.cache]


def _keep_on_redis(client: Any, name: str, pins: Pins, gone: Pins) -> None:
    for alias, pin in gone.items():
        # One by one: a newer pin of one pool says nothing of another's.
        if alias not in pins:
            client.eval(_FORGET, 1, name, *_fields({alias: pin}))
    if pins:
        client.eval(_MERGE, 1, name, _timeout(pins) * 1000, *_fields(pins))


def _fields(pins: Pins) -> Iterator[str]:
    for alias, pin in pins.items():
        yield from (f"{alias}|until", str(round(pin.until * 1000)))
        yield from (f"{alias}|held", str(round(pin.held_until * 1000)))
        for log, point in (pin.position or {}).items():
            yield from (f"{alias}|at|{log}", str(point))
            yield from (f"{alias}|to|{log}", str(round(pin.until * 1000)))


def _from_fields(fields: Mapping[bytes, bytes]) -> dict[str, Pin]:
    parts: dict[str, dict[str, int]] = {}
    for name, value in fields.items():
        alias, _, field = name.decode().partition("|")
        parts.setdefault(alias, {})[field] = int(value)
    return {alias: _pin_of(known) for alias, known in parts.items()}


def _pin_of(known: Mapping[str, int]) -> Pin:
    now = clock.now() * 1000
    # A log that nobody writes any more, after a promotion say, ends with its own window.
    position = {
        field.removeprefix("at|"): point
        for field, point in known.items()
        if field.startswith("at|") and known.get(field.replace("at|", "to|", 1), 0) > now
    }
    return Pin(known.get("until", 0) / 1000, known.get("held", 0) / 1000, position or None)


# Outages


# The base classes of what clients raise where their server can't be reached, does not answer, or
# is not the one that takes writes any more.
_OUTAGES = {
    "redis.exceptions": ("ConnectionError", "TimeoutError", "ReadOnlyError"),
    "valkey.exceptions": ("ConnectionError", "TimeoutError", "ReadOnlyError"),
    # All servers being down is said by the base class itself.
    "pymemcache.exceptions": ("MemcacheError",),
    "pylibmc": ("Error",),
    "django_redis.exceptions": ("ConnectionInterrupted",),
}


def _is_outage(error: Exception) -> bool:
    if isinstance(error, (OSError, OperationalError, InterfaceError)):
        return True
    return any(
        isinstance(error, getattr(module, name, ()))
        for path, names in _OUTAGES.items()
        if (module := sys.modules.get(path)) is not None
        for name in names
    )


class _Bounded:
    """Leaves a cache alone for a while that failed, or was slow twice running; says so once."""

    def __init__(self) -> None:
        self._until = 0.0
        self._was_slow = False

    @property
    def is_out(self) -> bool:
        return time.monotonic() < self._until

    def reset(self) -> None:
        self._until, self._was_slow = 0.0, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            if _is_outage(error):
                self._leave_alone(error)
            else:
                # A bug, or what somebody else put there: nobody's input switches the cache off.
                log_rate_limited(
                    logger,
                    logging.ERROR,
                    ("lost", conf.cache),
                    "The cache %r lost some pins; others serve.",
                    conf.cache,
                    extra={"cache": conf.cache, "error": str(error)},
                    exc_info=error,
                )
        else:
            # Once may be this process, which had to wait for its turn.
            is_slow = time.monotonic() - started > LONGEST
            if is_slow and self._was_slow:
                self._leave_alone(f"it took longer than {LONGEST} s")
            self._was_slow = is_slow

    def _leave_alone(self, why: object) -> None:
        self._until = time.monotonic() + conf.retry_after
        log_rate_limited(
            logger,
            logging.ERROR,
            ("outage", conf.cache),
            "The cache %r is left alone for %s s; other stores serve: %s",
            conf.cache,
            conf.retry_after,
            why,
            extra={"cache": conf.cache, "seconds": conf.retry_after, "error": str(why)},
        )


_bounded = _Bounded()


@on_change
def _start_anew() -> None:
    _clients.clear()
    _bounded.reset()


# The store


class CacheStore(BaseStore):
    """
    Pins a user on every device, through the cache ``PINNING_CACHE``, under ``PINNING_USER_KEY``.

    Nobody without a key costs a look-up.
    """

    after_authentication = True

    def load(self, request: HttpRequest) -> Pins:
        key = _known(request, _key(request))
        return remember(request, self, fetch("user", [key]) if key is not None else {})

    def save(self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins) -> None:
        # Asked again: it may be this request that logged the user in, or out.
        if (key := _known(request, _key(request))) is not None:
            keep("user", [key], pins, self._gone(request, pins))

    async def aload(self, request: HttpRequest) -> Pins:
        key = _known(request, await _akey(request))
        return remember(request, self, await afetch("user", [key]) if key is not None else {})

    async def asave(
        self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins
    ) -> None:
        if (key := _known(request, await _akey(request))) is not None:
            await akeep("user", [key], pins, self._gone(request, pins))

    def _gone(self, request: HttpRequest, pins: Pins) -> Pins:
        """Return what was ended by hand, to be forgotten unless it has moved since."""
        return {alias: pin for alias, pin in loaded(request, self).items() if alias not in pins}


def user_key(request: HttpRequest) -> str | None:
    """
    Return the logged-in user's id, ``None`` for a visitor: the default of ``PINNING_USER_KEY``.

    The session knows the id, so the user is not asked of the database; a visitor without a
    session costs nothing.
    """
    if (known := _known_user(request)) is None and _has_session(request):
        with _unnoticed(request.session) as session:
            known = session.get(SESSION_KEY)
    return None if known is None else str(known)


async def auser_key(request: HttpRequest) -> str | None:
    """Return ``user_key(request)``, in async code."""
    if (known := _known_user(request)) is None and _has_session(request):
        with _unnoticed(request.session) as session:
            known = await session.aget(SESSION_KEY)
    return None if known is None else str(known)


@contextmanager
def _unnoticed(session: Any) -> Iterator[Any]:
    """Look into a session, which does not make the response one that varies by the cookie."""
    before = session.accessed
    try:
        yield session
    finally:
        session.accessed = before


def _has_session(request: HttpRequest) -> bool:
    session = getattr(request, "session", None)
    return session is not None and bool(session.session_key)


def _known_user(request: HttpRequest) -> str | None:
    """Return the id of the user whom somebody has asked for, or has found by a token say."""
    user = getattr(request, "user", None)
    # A lazy user that nobody has asked for comes from the session.
    if user is None or getattr(user, "_wrapped", None) is empty or not user.is_authenticated:
        return None
    return str(user.pk)


def _known(request: HttpRequest, key: str | None) -> str | None:
    """Return whom a request is of: who was there at last, also if they have logged out since."""
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
