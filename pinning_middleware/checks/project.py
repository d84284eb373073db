"""What stands beside the settings: the order of things, cookies, caches, other routers."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import suppress
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core import checks
from django.core.cache import DEFAULT_CACHE_ALIAS
from django.core.checks import CheckMessage, register
from django.db import router
from django.utils.module_loading import import_string

from pinning_middleware.checks.settings import TAG, spelled, value_of
from pinning_middleware.conf import conf, parse_replicas

__all__: list[str] = []

MIDDLEWARE = "pinning_middleware.middleware.PinningMiddleware"
ROUTER = "pinning_middleware.routers.PinningRouter"
CACHE_STORE = "pinning_middleware.stores.CacheStore"
COOKIE_STORE = "pinning_middleware.stores.CookieStore"
# Headers that mean something else to clients, servers or caches.
OTHERS_HEADERS = frozenset(
    {
        *("accept", "age", "allow", "authorization", "cache-control", "connection"),
        *("content-encoding", "content-length", "content-type", "cookie", "date", "etag"),
        *("expires", "forwarded", "host", "if-match", "if-none-match", "keep-alive"),
        *("last-modified", "link", "location", "origin", "pragma", "range", "referer"),
        *("retry-after", "server", "set-cookie", "te", "trailer", "transfer-encoding"),
        *("upgrade", "user-agent", "vary", "via", "www-authenticate", "x-csrftoken"),
    }
)
# Of memcached's clients: what bounds how long they wait for a connection, and for an answer.
TIMEOUTS = {
    "PyMemcacheCache": ("connect_timeout", "timeout"),
    "PyLibMCCache": ("connect_timeout", "receive_timeout"),
}


def _warning(number: int, says: str, hint: str) -> checks.Warning:
    return checks.Warning(says, hint=hint, id=f"pinning_middleware.W{number:03}")


def _replicas() -> dict[str, str]:
    """Return alias of a replica → its primary's, none where the setting can't be read."""
    try:
        pools = parse_replicas(value_of("PINNING_REPLICAS"))
    except ValueError:
        return {}
    return {alias: primary for primary, weights in pools.items() for alias in weights}


def _stores() -> list[str]:
    paths = value_of("PINNING_STORES")
    return list(paths) if isinstance(paths, (list, tuple)) else []


def _ignored_tables() -> Collection[Any]:
    tables = value_of("PINNING_IGNORED_TABLES")
    return tables if isinstance(tables, (list, tuple, set, frozenset)) else ()


def _has_store(path: str) -> bool:
    """Return whether this store is in use, or one that is derived from it."""
    return any(_is_instance(own, path) for own in _stores())


@register(TAG)
def check_wiring(**kwargs: Any) -> list[CheckMessage]:
    if not value_of("PINNING_REPLICAS"):
        return []
    return [
        *_check_first(
            "MIDDLEWARE", MIDDLEWARE, 2, "so that every read of a request is in its scope"
        ),
        *_check_first("DATABASE_ROUTERS", ROUTER, 3, "so that it can ask the routers after it"),
    ]


def _check_first(setting: str, path: str, number: int, why: str) -> list[CheckMessage]:
    entries: Sequence[Any] = getattr(settings, setting)
    if entries and (entries[0] == path or _is_instance(entries[0], path)):
        return []
    return [
        _warning(
            number,
            f"{spelled('PINNING_REPLICAS')} is set, and {path} is not the first entry of "
            f"{setting}.",
            f"Put it first, {why}. If that is on purpose, silence pinning_middleware.W{number:03}.",
        )
    ]


def _is_instance(entry: Any, path: str) -> bool:
    """Return whether this is the class of the path or one derived from it, or an instance."""
    try:
        kind = import_string(entry) if isinstance(entry, str) else type(entry)
        return isinstance(kind, type) and issubclass(kind, import_string(path))
    except ImportError:
        return False


@register(TAG)
def check_that_pins_are_kept(**kwargs: Any) -> list[CheckMessage]:
    if not value_of("PINNING_REPLICAS") or value_of("PINNING_STORES") not in ([], ()):
        return []
    return [
        _warning(
            4,
            "PINNING_STORES is empty, so that a write pins its own request only.",
            f"The default is [{COOKIE_STORE!r}].",
        )
    ]


@register(TAG)
def check_weights(**kwargs: Any) -> list[CheckMessage]:
    try:
        pools = parse_replicas(value_of("PINNING_REPLICAS"))
    except ValueError:
        return []
    return [
        _warning(
            5,
            f"Every replica of {primary!r} has weight 0, so that the primary has all reads.",
            "0 is for one that is drained or warmed while others serve.",
        )
        for primary, weights in pools.items()
        if weights and not any(weights.values())
    ]


@register(TAG)
def check_cookie_fits(**kwargs: Any) -> list[CheckMessage]:
    if not _has_store(COOKIE_STORE):
        return []
    cookie, name = conf.cookie, conf.cookie_name
    found: list[CheckMessage] = []
    if str(cookie["samesite"]).lower() == "none" and not cookie["secure"]:
        found.append(
            _warning(
                6,
                "The pinning cookie has SameSite=None and is not Secure: browsers refuse it.",
                f"Set {spelled('PINNING_COOKIE_SECURE')} = True (or SESSION_COOKIE_SECURE).",
            )
        )
    names = ("SESSION_COOKIE_NAME", "CSRF_COOKIE_NAME", "LANGUAGE_COOKIE_NAME")
    others = {getattr(settings, other): other for other in names} | {
        "messages": "the cookie of messages"
    }
    found += [
        checks.Error(
            f"{spelled('PINNING_COOKIE_NAME')} is {name!r}, and {other} is {own!r} as well.",
            hint="Give it a name of its own. What a client has seen is in a second one, "
            f"{conf.seen_cookie_name!r}.",
            id="pinning_middleware.E019",
        )
        for own in (name, conf.seen_cookie_name)
        if (other := others.get(own)) is not None
    ]
    host = name.startswith("__Host-") and (cookie["domain"] or cookie["path"] != "/")
    if host or (name.startswith(("__Host-", "__Secure-")) and not cookie["secure"]):
        found.append(
            _warning(
                7,
                f"Browsers refuse a cookie of the name {name!r} with these attributes.",
                "__Host- wants Secure, the path / and no domain; __Secure- wants Secure.",
            )
        )
    return found


@register(TAG)
def check_header_name(**kwargs: Any) -> list[CheckMessage]:
    name = value_of("PINNING_HEADER_NAME")
    if not isinstance(name, str) or name.lower() not in OTHERS_HEADERS:
        return []
    return [
        checks.Error(
            f"PINNING_HEADER_NAME is {name!r}, which means something else.",
            hint="Give it a name of its own; the default is 'Pinning-Token'.",
            id="pinning_middleware.E020",
        )
    ]


@register(TAG)
def check_cache_fits(**kwargs: Any) -> list[CheckMessage]:
    alias = value_of("PINNING_CACHE")
    if not _has_store(CACHE_STORE) or alias not in settings.CACHES:
        return []
    entry = settings.CACHES[alias]
    backend = entry.get("BACKEND", "")
    kind = backend.rpartition(".")[2]
    if kind in ("LocMemCache", "DummyCache"):
        return [
            _warning(
                8,
                f"CacheStore is on {backend}, which other processes do not share.",
                "Use Redis, Valkey, memcached or a database.",
            )
        ]
    options = entry.get("OPTIONS", {})
    if kind == "PyLibMCCache":
        options = options.get("behaviors", {})
    missing = [name for name in TIMEOUTS.get(kind, ()) if not options.get(name)]
    if not missing:
        return []
    hint = f"Set {' and '.join(map(repr, missing))} in its OPTIONS, to half a second say."
    if kind == "PyLibMCCache":
        hint = (
            f"Set {' and '.join(map(repr, missing))} in its OPTIONS, under 'behaviors': the first "
            "is in milliseconds (500), the other in microseconds (500_000)."
        )
    return [
        _warning(
            9,
            f"CacheStore is on {backend} without {' and '.join(missing)}: a server that says "
            "nothing would hold up requests.",
            hint,
        )
    ]


@register(TAG)
def check_caches_in_the_database(**kwargs: Any) -> list[CheckMessage]:
    own = value_of("PINNING_CACHE") if _has_store(CACHE_STORE) else DEFAULT_CACHE_ALIAS
    ignored = {str(table).lower() for table in _ignored_tables()}
    return [
        _warning(
            13,
            f"The cache {alias!r} is a table of the database: who sets anything in it is pinned.",
            "Use Redis, Valkey or memcached. Or, if no request relies on what an earlier one has "
            f"set there, have {entry.get('LOCATION')!r} in PINNING_IGNORED_TABLES.",
        )
        for alias, entry in settings.CACHES.items()
        if str(entry.get("BACKEND", "")).endswith(".DatabaseCache")
        and (alias == DEFAULT_CACHE_ALIAS or alias != own)
        and str(entry.get("LOCATION")).lower() not in ignored
        and _replicas()
    ]


@register(TAG)
def check_replicas_settings(**kwargs: Any) -> list[CheckMessage]:
    return [
        _warning(
            10,
            f"ATOMIC_REQUESTS is set on {alias!r}, a replica of {primary!r}.",
            "Set it on the primary only: reads in a transaction can't be run again elsewhere.",
        )
        for alias, primary in _replicas().items()
        if settings.DATABASES.get(alias, {}).get("ATOMIC_REQUESTS")
    ]


@register(TAG)
def check_other_routers(**kwargs: Any) -> list[CheckMessage]:
    replicas = _replicas()
    if not replicas:
        return []
    return [
        _warning(
            11,
            f"{type(other).__name__} sends {says} of {label} to {alias!r}, which is a replica.",
            "A router after PinningRouter says which primary a model belongs to; reads are spread "
            "over its replicas by PinningRouter.",
        )
        for other, says, label, alias in _answers(replicas)
    ]


def _answers(replicas: Container[str]) -> Iterator[tuple[Any, str, str, str]]:
    """Return the first replica that each router beside ours answers with, and for which model."""
    for other in router.routers:
        if _is_instance(other, ROUTER):
            continue
        for says in ("db_for_read", "db_for_write"):
            method = getattr(other, says, None)
            if method is None:
                continue
            for model in apps.get_models():
                try:
                    alias = method(model)
                except Exception:
                    # One that wants more than this says nothing here.
                    continue
                if alias in replicas:
                    yield other, says, model._meta.label, str(alias)
                    break


@register(TAG)
def check_ignored_tables_fit(**kwargs: Any) -> list[CheckMessage]:
    read_back = {"django_session"}
    with suppress(LookupError, ValueError):
        read_back.add(apps.get_model(settings.AUTH_USER_MODEL)._meta.db_table.lower())
    return [
        _warning(
            12,
            f"PINNING_IGNORED_TABLES has {table!r}, which the next request reads back.",
            "A login or a cart would seem lost; ignore a hit counter's table, and no other.",
        )
        for table in _ignored_tables()
        if str(table).lower() in read_back
    ]


@register(TAG)
def check_guarantee_fits(**kwargs: Any) -> list[CheckMessage]:
    guarantee = value_of("PINNING_CONSISTENCY")
    if guarantee != "monotonic-reads" or value_of("PINNING_POSITIONS") is not False:
        return []
    if not _replicas():
        return []
    return [
        _warning(
            14,
            f"PINNING_CONSISTENCY is {guarantee!r} and PINNING_POSITIONS is False: without "
            "positions nobody knows what a client has seen, and only its writes pin it.",
            "Leave PINNING_POSITIONS out, or PINNING_CONSISTENCY.",
        )
    ]
