"""
Pins on Redis or Valkey: a hash for each key, merged on the server by a script.

Every command has a single key, so that a cluster accepts it. If the server refuses scripts (an ACL
without `@scripting`, a proxy), pins are read, merged and written back; of two scopes that end at
the same instant one may then win.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from django.core.cache import BaseCache, caches

from pinning_middleware.conf import conf, on_change
from pinning_middleware.pins import Pin, PinKey, Pins, Position, merge_pins
from pinning_middleware.stores import circuit_breaker
from pinning_middleware.utils import clock

logger = logging.getLogger("pinning_middleware.pins")

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
# Remove only what is unchanged since it was read: a newer write's pin stays. The end of each log's
# window is not compared, since a pin has only the latest of them; a newer write moves a position.
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


class RedisPins:
    """Loads and saves pins through a client of Redis or Valkey."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._scripts_allowed = True

    def load(self, names: Sequence[str]) -> dict[PinKey, Pin]:
        """Return the merged pins of these keys of the server, in one round trip."""
        pipeline = self.client.pipeline(transaction=False)
        for name in names:
            pipeline.hgetall(name)
        return merge_pins(*map(_from_fields, pipeline.execute()))

    def save(self, name: str, pins: Pins, forget: Pins) -> None:
        """Merge pins into those of a key, and remove those of `forget` that did not change."""
        for key, pin in forget.items():
            # One by one: a newer pin of one pool does not keep that of another.
            if key not in pins:
                fields = dict(_fields({key: pin}))
                if not self._run(_FORGET, name, fields):
                    self._forget(name, fields)
        if pins:
            fields = dict(_fields(pins))
            milliseconds = lifetime(pins) * 1000
            if not self._run(_MERGE, name, fields, milliseconds):
                self._merge(name, fields, milliseconds)

    def evicted_keys(self) -> int:
        """Return how many keys the server has evicted since its start, 0 if it does not report."""
        try:
            return int(self.client.info("stats")["evicted_keys"])
        except Exception:  # An ACL without INFO, a cluster that answers for each node, an outage.
            return 0

    def _run(self, script: str, name: str, fields: Mapping[str, str], *args: int) -> bool:
        """Return False if the server refuses to run scripts, which is logged once."""
        if not self._scripts_allowed:
            return False
        arguments = [part for field in fields.items() for part in field]
        try:
            self.client.eval(script, 1, name, *args, *arguments)
        except Exception as error:
            if not _is_refused(error):
                raise
            self._scripts_allowed = False
            logger.warning(
                "Cache %r does not run scripts, so pins of parallel requests are merged by best "
                "effort; allow EVAL for its user: %s",
                conf.cache,
                error,
                extra={"cache": conf.cache, "error": str(error)},
            )
        return self._scripts_allowed

    def _merge(self, name: str, fields: Mapping[str, str], milliseconds: int) -> None:
        known = _decoded(self.client.hgetall(name))
        newer = {
            field: value
            for field, value in fields.items()
            if field not in known or int(value) > int(known[field])
        }
        if newer:
            self.client.hset(name, mapping=newer)
        if milliseconds > self.client.pttl(name):
            self.client.pexpire(name, milliseconds)

    def _forget(self, name: str, fields: Mapping[str, str]) -> None:
        known = _decoded(self.client.hgetall(name))
        compared = [field for field in fields if "|to|" not in field]
        if all(known.get(field) == fields[field] for field in compared):
            self.client.hdel(name, *fields)


def _is_refused(error: Exception) -> bool:
    """Return whether the server forbids scripts (ACL), or does not have the command (proxies)."""
    names = {base.__name__ for base in type(error).__mro__}
    return "NoPermissionError" in names or (
        "ResponseError" in names and "unknown command" in str(error).lower()
    )


def lifetime(pins: Pins) -> int:
    """Return for how long these pins are needed (whole seconds); 0 if they have ended."""
    return max((math.ceil(pin.until - clock.now()) for pin in pins.values()), default=0)


def _fields(pins: Pins) -> Iterator[tuple[str, str]]:
    for key, pin in pins.items():
        name, until = key.dump(), str(round(pin.until * 1000))
        yield f"{name}|until", until
        yield f"{name}|primary", str(round(max(0.0, pin.primary_only_end) * 1000))
        points, optional = pin.position or ({}, frozenset())
        for log, offset in points.items():
            yield f"{name}|at|{log}", str(offset)
            yield f"{name}|to|{log}", until
            if log not in optional:
                yield f"{name}|required|{log}", "1"


def _decoded(fields: Mapping[Any, Any]) -> dict[str, str]:
    # A client that was made with decode_responses returns text.
    return {_text(name): _text(value) for name, value in fields.items()}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _from_fields(fields: Mapping[Any, Any]) -> dict[PinKey, Pin]:
    parts: dict[str, dict[str, int]] = {}
    for name, value in _decoded(fields).items():
        key, _, field = name.partition("|")
        parts.setdefault(key, {})[field] = int(value)
    return {PinKey.load(key): _pin_of(known) for key, known in parts.items()}


def _pin_of(known: Mapping[str, int]) -> Pin:
    # A log that is no longer written, for example after a promotion, ends with its own window. The
    # newest one does not: the clock of the server that wrote it may be behind, and the server of
    # the cache ends the key.
    ends = {field[3:]: end for field, end in known.items() if field.startswith("to|")}
    latest = min(max(ends.values(), default=0), clock.now() * 1000 + 1)
    logs: dict[int, list[str]] = {}
    for log, end in ends.items():
        if end >= latest:
            logs.setdefault(end, []).append(log)
    # The logs of one window are those of one position.
    pin = Pin(0.0)
    for end, names in logs.items():
        points = {log: known[f"at|{log}"] for log in names}
        optional = frozenset(log for log in names if f"required|{log}" not in known)
        pin = pin.merge(Pin(end / 1000, None, Position(points, optional)))
    return Pin(
        known.get("until", 0) / 1000,
        max(known.get("primary", 0) / 1000, pin.primary_only_end),
        pin.position,
    )


# Clients


def _client_factory(cache: BaseCache) -> Callable[[], Any] | None:
    """Return what makes a client of the writable server: Django's backend or django-redis."""
    for name in ("_cache", "client"):
        get_client = getattr(getattr(cache, name, None), "get_client", None)
        if get_client is not None:
            return functools.partial(get_client, write=True)
    return None


_by_alias: dict[str, RedisPins] = {}
on_change(_by_alias.clear)


def redis_pins() -> RedisPins | None:
    """Return the pins in PINNING_CACHE, or None if that is not Redis or Valkey."""
    make_client = _client_factory(caches[conf.cache])
    if make_client is None:
        return None
    if conf.cache not in _by_alias:
        _by_alias[conf.cache] = RedisPins(_with_timeouts(make_client()))
    return _by_alias[conf.cache]


def _with_timeouts(client: Any) -> Any:
    """Return a client whose calls are bounded by TIMEOUT, unless the site chose other bounds."""
    pool = getattr(client, "connection_pool", None)
    if pool is None:
        # The client of a cluster has a pool for each node.
        return client
    bounds = {
        "socket_timeout": circuit_breaker.TIMEOUT,
        "socket_connect_timeout": circuit_breaker.TIMEOUT,
    }
    limits = {
        name: getattr(pool, name) for name in ("max_connections", "timeout") if hasattr(pool, name)
    }
    chosen = {name: value for name, value in pool.connection_kwargs.items() if value is not None}
    try:
        bounded = type(pool)(
            connection_class=pool.connection_class, **{**bounds, **limits, **chosen}
        )
    except TypeError:
        # A pool with another constructor, for example Sentinel's: only the site can bound it.
        bounded = pool
    return type(client)(connection_pool=bounded)
