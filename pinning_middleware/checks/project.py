"""The settings in the context of the project: middleware, routers, cookies, caches, databases."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

from django.apps import apps
from django.conf import settings
from django.core.cache import DEFAULT_CACHE_ALIAS
from django.core.checks import CheckMessage
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, router
from django.utils.module_loading import import_string

from pinning_middleware.checks.messages import check, error, warning
from pinning_middleware.checks.router_code import aliases_in_code
from pinning_middleware.checks.settings import imported, is_strings, value_of
from pinning_middleware.conf import conf
from pinning_middleware.routing.compatibility import is_interchangeable

MIDDLEWARE: Final = "pinning_middleware.middleware.PinningMiddleware"
ROUTER: Final = "pinning_middleware.routers.PinningRouter"
CACHE_STORE: Final = "pinning_middleware.stores.CacheStore"
COOKIE_STORE: Final = "pinning_middleware.stores.CookieStore"
# Standard headers of clients, servers or caches.
STANDARD_HEADERS: Final = frozenset(
    {
        *("accept", "age", "allow", "authorization", "cache-control", "connection"),
        *("content-encoding", "content-length", "content-type", "cookie", "date", "etag"),
        *("expires", "forwarded", "host", "if-match", "if-none-match", "keep-alive"),
        *("last-modified", "link", "location", "origin", "pragma", "range", "referer"),
        *("retry-after", "server", "set-cookie", "te", "trailer", "transfer-encoding"),
        *("upgrade", "user-agent", "vary", "via", "www-authenticate", "x-csrftoken"),
    }
)
# Clients of memcached → options that bound connecting and waiting for a reply.
TIMEOUTS: Final = {
    "PyMemcacheCache": ("connect_timeout", "timeout"),
    "PyLibMCCache": ("connect_timeout", "receive_timeout"),
}
# PINNING_POSITIONS → vendors whose databases report such positions.
VENDORS: Final = {"lsn": ("postgresql",), "xid": ("postgresql",), "gtid": ("mysql",)}
DEFAULT_PORTS: Final = {"postgresql": "5432", "mysql": "3306", "oracle": "1521"}
DATABASE_SESSIONS: Final = (
    "django.contrib.sessions.backends.db",
    "django.contrib.sessions.backends.cached_db",
)
# Apps that store every request: their package, and the middleware that does it.
REQUEST_RECORDERS: Final = {"silk": ("django-silk", "silk.middleware.SilkyMiddleware")}
CONSTANCE_BACKEND: Final = "constance.backends.database.DatabaseBackend"
_WAFFLE_HINT: Final = (
    " The users and groups of a flag are cached too, by reads of their own models: call "
    "flag_is_active() inside use_primary."
)
_MODEL_LABEL: Final = re.compile(r"[a-z_]\w*\.[A-Z]\w*")


def _pools_setting() -> str | None:
    """Return the name of the setting that the pools of the site come from, or None."""
    names = ("PINNING_REPLICAS", "PINNING_DRY_RUN")
    return next((conf.effective_name(name) for name in names if value_of(name)), None)


def _vendor(alias: str) -> str:
    """Return the vendor of a database, or "" if the alias or its ENGINE is invalid."""
    with suppress(ImproperlyConfigured):
        if alias in settings.DATABASES:
            return connections[alias].vendor
    return ""


def _stores() -> list[str]:
    paths = value_of("PINNING_STORES")
    return list(paths) if isinstance(paths, (list, tuple)) else []


def _ignored_tables() -> Collection[str]:
    tables = value_of("PINNING_IGNORED_TABLES")
    return tables if isinstance(tables, (list, tuple, set, frozenset)) else ()


def has_store(path: str) -> bool:
    """Return whether this store is used, or one derived from it."""
    return any(_is_instance(own, path) for own in _stores())


def _is_instance(entry: Any, path: str) -> bool:
    """Return whether this is the class of the path or one derived from it, or an instance."""
    kind = imported(entry)[0] if isinstance(entry, str) else type(entry)
    return isinstance(kind, type) and issubclass(kind, import_string(path))


# Middleware and routers


@check
def check_order() -> Iterator[CheckMessage]:
    if _pools_setting() is None:
        return
    why = "so that it sees every read of a request"
    yield from _check_first("W002", "MIDDLEWARE", MIDDLEWARE, why)
    why = "so that it can consult the routers after it"
    yield from _check_first("W003", "DATABASE_ROUTERS", ROUTER, why)


def _check_first(number: str, setting: str, path: str, why: str) -> Iterator[CheckMessage]:
    entries: Sequence[Any] = getattr(settings, setting)
    places = [n for n, entry in enumerate(entries) if entry == path or _is_instance(entry, path)]
    if places[:1] == [0]:
        return
    problem = f"{path} is not the first entry of" if places else f"{path} is missing from"
    yield warning(
        number,
        f"{_pools_setting()} is set, but {problem} {setting}.",
        f"Set it as the first entry of {setting}, {why}.",
    )


@check
def check_other_routers() -> list[CheckMessage]:
    return [
        warning(
            "W011",
            f"{type(other).__name__}.{method}() returns the replica {alias!r} {when}.",
            "Return the primary that a model belongs to; PinningRouter selects the replica.",
        )
        for other, method, when, alias in _returned_replicas(conf.readonly_aliases)
    ]


def _returned_replicas(replicas: Container[str]) -> Iterator[tuple[Any, str, str, str]]:
    """Yield the first replica that each method of the other routers returns, and for what."""
    for other in router.routers:
        if _is_instance(other, ROUTER):
            continue
        for name in ("db_for_read", "db_for_write"):
            if (method := getattr(other, name, None)) is None:
                continue
            for model in apps.get_models():
                try:
                    alias = method(model)
                except Exception:
                    # A router that needs hints cannot be checked.
                    continue
                if isinstance(alias, str) and alias in replicas:
                    yield other, name, f"for {model._meta.label}", alias
                    break
            else:
                if named := aliases_in_code(other, name, replicas):
                    yield other, name, "in some cases, as its code shows", named[0]


# Stores


@check
def check_stores_not_empty() -> Iterator[CheckMessage]:
    if _pools_setting() is not None and value_of("PINNING_STORES") in ([], ()):
        yield warning(
            "W004",
            "PINNING_STORES is empty, so a write pins only its own request.",
            f"Set [{COOKIE_STORE!r}], the default.",
        )


@check
def check_cookie_attributes() -> Iterator[CheckMessage]:
    if not has_store(COOKIE_STORE):
        return
    cookie, name = conf.cookie, conf.cookie_name
    # None, other than "None", sets no attribute.
    samesite = cookie["samesite"] or ""
    if str(samesite).lower() == "none" and not cookie["secure"]:
        yield warning(
            "W006",
            "The pinning cookie has SameSite=None without Secure, so browsers reject it.",
            f"Set {conf.effective_name('PINNING_COOKIE_SECURE')} = True (or "
            "SESSION_COOKIE_SECURE).",
        )
    host = name.startswith("__Host-") and (cookie["domain"] or cookie["path"] != "/")
    if host or (name.startswith(("__Host-", "__Secure-")) and not cookie["secure"]):
        yield warning(
            "W007",
            f"Browsers reject a cookie named {name!r} with these attributes.",
            "Set Secure for __Secure-, and Secure, the path / and no domain for __Host-.",
        )


@check
def check_cookie_name_is_unique() -> Iterator[CheckMessage]:
    if not has_store(COOKIE_STORE):
        return
    names = ("SESSION_COOKIE_NAME", "CSRF_COOKIE_NAME", "LANGUAGE_COOKIE_NAME")
    others = {getattr(settings, other): other for other in names}
    others["messages"] = "the cookie of django.contrib.messages"
    for own in (conf.cookie_name, conf.seen_cookie_name):
        if own in others:
            yield error(
                "E019",
                f"{conf.effective_name('PINNING_COOKIE_NAME')} is {conf.cookie_name!r}, and "
                f"{others[own]} is {own!r} as well.",
                "Set a name of its own. With monotonic-reads, a second cookie is named "
                f"{conf.seen_cookie_name!r}.",
            )


@check
def check_header_name() -> Iterator[CheckMessage]:
    name = value_of("PINNING_HEADER_NAME")
    if isinstance(name, str) and name.lower() in STANDARD_HEADERS:
        yield error(
            "E020",
            f"PINNING_HEADER_NAME is {name!r}, which is a standard HTTP header.",
            "Set a name of its own; the default is 'Pinning-Token'.",
        )


# Caches


@check
def check_cache_is_shared_and_bounded() -> Iterator[CheckMessage]:
    alias = value_of("PINNING_CACHE")
    if not has_store(CACHE_STORE) or alias not in settings.CACHES:
        return
    entry = settings.CACHES[alias]
    backend = entry.get("BACKEND", "")
    kind = backend.rpartition(".")[2]
    if kind in ("LocMemCache", "DummyCache"):
        yield warning(
            "W008",
            f"CacheStore uses {backend}, which processes do not share.",
            "Set PINNING_CACHE to a cache on Redis, Valkey, memcached or a database.",
        )
        return
    options = entry.get("OPTIONS", {})
    where, units = "OPTIONS", "to half a second, for example"
    if kind == "PyLibMCCache":
        options = options.get("behaviors", {})
        where = "OPTIONS['behaviors']"
        units = "(the first in milliseconds: 500, the other in microseconds: 500_000)"
    missing = [name for name in TIMEOUTS.get(kind, ()) if not options.get(name)]
    if missing:
        yield warning(
            "W009",
            f"CacheStore uses {backend} without {' and '.join(missing)}: an unresponsive cache "
            "server would block requests.",
            f"Set {' and '.join(map(repr, missing))} in {where}, {units}.",
        )


@check
def check_database_caches() -> list[CheckMessage]:
    own = value_of("PINNING_CACHE") if has_store(CACHE_STORE) else DEFAULT_CACHE_ALIAS
    ignored = {str(table).lower() for table in _ignored_tables()}
    return [
        warning(
            "W013",
            f"The cache {alias!r} is stored in the database, so every request that sets a value "
            "in it is pinned to the primary.",
            "Set another backend such as Redis, Valkey or memcached. If no request depends on "
            f"values that an earlier one set, add {entry.get('LOCATION')!r} to "
            "PINNING_IGNORED_TABLES.",
        )
        for alias, entry in settings.CACHES.items()
        if str(entry.get("BACKEND", "")).endswith(".DatabaseCache")
        and (alias == DEFAULT_CACHE_ALIAS or alias != own)
        and str(entry.get("LOCATION")).lower() not in ignored
        and conf.readonly_aliases
    ]


# What writes in every request


@check
def check_sessions_saved_every_request() -> Iterator[CheckMessage]:
    if not (conf.readonly_aliases and settings.SESSION_SAVE_EVERY_REQUEST):
        return
    if settings.SESSION_ENGINE not in DATABASE_SESSIONS or "django_session" in _ignored_tables():
        return
    yield warning(
        "W020",
        "SESSION_SAVE_EVERY_REQUEST is set and sessions are stored in the database, so every "
        "user with a session is pinned to the primary.",
        "Set it to False, or SESSION_ENGINE to 'django.contrib.sessions.backends.cache' with a "
        "cache that is shared.",
    )


@check
def check_recorded_requests() -> Iterator[CheckMessage]:
    if not conf.readonly_aliases:
        return
    ignored = {str(table).lower() for table in _ignored_tables()}
    for label, (package, middleware) in REQUEST_RECORDERS.items():
        if not (apps.is_installed(label) and middleware in settings.MIDDLEWARE):
            continue
        models = apps.get_app_config(label).get_models(include_auto_created=True)
        tables = sorted(model._meta.db_table for model in models)
        if missing := [table for table in tables if table.lower() not in ignored]:
            yield warning(
                "W021",
                f"{package} stores every request in the database, so every user is pinned "
                "to the primary.",
                f"Add its tables to PINNING_IGNORED_TABLES: {', '.join(map(repr, missing))}.",
            )


# What is cached for all users


@check
def check_shared_caches() -> list[CheckMessage]:
    """
    A value that is cached for all users must not be read from a lagging replica: the read of
    another user would refill the cache with the old value just after a write, and it would stay.
    """
    labels = value_of("PINNING_PRIMARY_MODELS")
    listed = {label.lower() for label in labels} if is_strings(labels) else set()
    return [
        warning(
            "W022",
            f"{package} caches {', '.join(missing)} for all users, and a lagging replica can "
            "refill the cache with an old value.",
            f"Add {', '.join(map(repr, missing))} to PINNING_PRIMARY_MODELS.{also}",
        )
        for package, models, also in _cached_for_all_users()
        if (missing := [label for label in models if not _is_listed(label, listed)])
    ]


def _cached_for_all_users() -> Iterator[tuple[str, list[str], str]]:
    """Yield packages that cache models for all users, with the models and a further hint."""
    if apps.is_installed("django.contrib.sites"):
        # SITE_CACHE, a dict of each process.
        yield "django.contrib.sites", ["sites.Site"], ""
    if (
        apps.is_installed("constance")
        and _is_instance(getattr(settings, "CONSTANCE_BACKEND", None), CONSTANCE_BACKEND)
        and _is_shared(getattr(settings, "CONSTANCE_DATABASE_CACHE_BACKEND", None))
    ):
        yield "django-constance", ["constance.Constance"], ""
    if apps.is_installed("waffle") and _is_shared(
        getattr(settings, "WAFFLE_CACHE_NAME", DEFAULT_CACHE_ALIAS)
    ):
        names = ("Flag", "Switch", "Sample")
        models = [
            getattr(settings, f"WAFFLE_{name.upper()}_MODEL", f"waffle.{name}") for name in names
        ]
        if not getattr(settings, "WAFFLE_READ_FROM_WRITE_DB", False):
            yield "django-waffle", models, _WAFFLE_HINT


def _is_shared(alias: Any) -> bool:
    """Return whether the processes of a site share this cache."""
    backend = str(settings.CACHES.get(alias, {}).get("BACKEND", ""))
    return bool(backend) and not backend.endswith((".LocMemCache", ".DummyCache"))


def _is_listed(label: str, listed: Container[str]) -> bool:
    """Return whether a model always reads the primary, also since its pool has no replicas."""
    label = label.lower()
    if label in listed or label.partition(".")[0] in listed:
        return True
    try:
        return not conf.replicas.get(router.db_for_write(apps.get_model(label)))
    except Exception:
        # A router that needs hints cannot be called here.
        return not conf.readonly_aliases


@check
def check_cached_queries() -> Iterator[CheckMessage]:
    """Find a cache of query results that a write invalidates for its own alias only."""
    if not apps.is_installed("cachalot") or not conf.readonly_aliases:
        return
    # In django-cachalot 2.9.1 the keys of results and of their tables contain the alias.
    cached = getattr(settings, "CACHALOT_DATABASES", "supported_only")
    if is_strings(cached) and conf.readonly_aliases.keys().isdisjoint(cached):
        return
    primaries = sorted(set(conf.readonly_aliases.values()))
    yield warning(
        "W035",
        "django-cachalot caches what was read from replicas, and a write to the primary does not "
        "invalidate that.",
        f"Set CACHALOT_DATABASES = {primaries!r}.",
    )


# Databases


@check
def check_weights_not_all_zero() -> list[CheckMessage]:
    return [
        warning(
            "W005",
            f"Every replica of {primary!r} has the weight 0, so all reads go to the primary.",
            "Set a weight above 0 for one of them; 0 is for a replica that is drained or warmed.",
        )
        for primary, weights in conf.replicas.items()
        if weights and not any(weights.values())
    ]


@check
def check_atomic_requests() -> list[CheckMessage]:
    return [
        warning(
            "W010",
            f"ATOMIC_REQUESTS is set on {alias!r}, a replica of {primary!r}.",
            "Set it on the primary only: a read in a transaction cannot be retried elsewhere.",
        )
        for alias, primary in conf.readonly_aliases.items()
        if settings.DATABASES.get(alias, {}).get("ATOMIC_REQUESTS")
    ]


@check
def check_position_method() -> list[CheckMessage]:
    method = value_of("PINNING_POSITIONS")
    vendors = VENDORS.get(method, ()) if isinstance(method, str) else ()
    return [
        warning(
            "W015",
            f"PINNING_POSITIONS is {method!r}, which {primary!r} ({vendor}) does not support, so "
            "its pins last the full window.",
            "Set True for the best method of each database.",
        )
        for primary, weights in conf.replicas.items()
        # A SQLite database, as in development, has no replicas of its own.
        if weights and vendors and (vendor := _vendor(primary)) in DEFAULT_PORTS
        if vendor not in vendors
    ]


@check
def check_interchangeable_aliases() -> list[CheckMessage]:
    return [
        warning(
            "W017",
            f"{alias!r} and its primary {primary!r} differ in more than their server, so no read "
            "fails over between them.",
            "Set the same ENGINE, NAME, USER, TIME_ZONE and OPTIONS for every alias of a pool. "
            "OPTIONS of the connection, such as timeouts, may differ.",
        )
        for alias, primary in conf.readonly_aliases.items()
        # Every SQLite alias has a file of its own.
        if "" != _vendor(alias) != "sqlite"
        and _vendor(primary)
        and not is_interchangeable(primary, alias)
    ]


@check
def check_other_aliases_of_primaries() -> list[CheckMessage]:
    pools = conf.replicas
    legacy = getattr(settings, "SLAVE_DATABASES", None)
    in_pools = {*pools, *conf.readonly_aliases, *(legacy if legacy and is_strings(legacy) else ())}
    primaries = {_database(primary): primary for primary, weights in pools.items() if weights}
    primaries.pop(None, None)
    return [
        warning(
            "W018",
            f"{alias!r} is the same database as {primaries[database]!r}, the primary of a pool: "
            "writes through it pin the pool, but reads through it are not routed.",
            f"Use {primaries[database]!r} instead. If {alias!r} is for migrations or maintenance "
            "only, silence this check.",
        )
        for alias in settings.DATABASES
        if alias not in in_pools and (database := _database(alias)) in primaries
    ]


def _database(alias: str) -> tuple[str, ...] | None:
    """Return what identifies the database of an alias, or None if it is unknown or private."""
    vendor = _vendor(alias)
    if not vendor:
        return None
    entry = connections.settings[alias]
    name = str(entry["NAME"])
    if not name or ":memory:" in name:
        return None
    host = str(entry["HOST"]).lower()
    return vendor, host, str(entry["PORT"]) or DEFAULT_PORTS.get(vendor, ""), name


@check
def check_schema_of_tenants() -> Iterator[CheckMessage]:
    if value_of("PINNING_SESSION_SETUP") is not None:
        return
    for primary, weights in conf.replicas.items():
        if weights and _vendor(primary) and hasattr(connections[primary], "set_schema"):
            yield warning(
                "W024",
                f"The ENGINE of {primary!r} sets a tenant's schema on one connection only, so "
                "replicas answer from another schema.",
                "Set PINNING_SESSION_SETUP to a function that sets the same schema on the "
                "connections of the replicas. docs/how-to/tenants.md has one for django-tenants.",
            )


@check
def check_async_connections() -> Iterator[CheckMessage]:
    if not apps.is_installed("django_async_backend") or _pools_setting() is None:
        return
    yield warning(
        "W033",
        "django_async_backend is installed. Reads of its async connections are routed, their "
        "writes pin, transactions read the primary, writes on replicas are rejected, and the "
        "primary replaces a replica that cannot be connected to. But no other failure of a "
        "read is retried, the role, position and lag of the server behind a connection are "
        "not checked before a statement, COPY is not detected, and PINNING_SESSION_SETUP is "
        "not called.",
        "Use Django's own connections where that matters. Silence this check "
        "(SILENCED_SYSTEM_CHECKS) if it does not.",
    )


# Tables and guarantees


@check
def check_ignored_tables_are_not_read_back() -> list[CheckMessage]:
    read_back = {"django_session"}
    with suppress(LookupError, ValueError):
        read_back.add(apps.get_model(settings.AUTH_USER_MODEL)._meta.db_table.lower())
    return [
        warning(
            "W012",
            f"PINNING_IGNORED_TABLES contains {table!r}, which the next request reads back.",
            "Remove it, since logins and carts would seem to be lost. Set only tables such as "
            "that of a hit counter.",
        )
        for table in _ignored_tables()
        if str(table).lower() in read_back
    ]


@check
def check_ignored_tables_are_tables() -> Iterator[CheckMessage]:
    for name in _ignored_tables():
        if not isinstance(name, str) or "." not in name:
            continue
        table = ""
        with suppress(LookupError, ValueError):
            table = apps.get_model(name)._meta.db_table
        if table or _MODEL_LABEL.fullmatch(name):
            yield warning(
                "W016",
                f"PINNING_IGNORED_TABLES contains {name!r}, which is the label of a model and "
                "not the name of a table.",
                f"Set {table or name.replace('.', '_').lower()!r} instead.",
            )


@check
def check_monotonic_reads_need_positions() -> Iterator[CheckMessage]:
    guarantee = value_of("PINNING_CONSISTENCY")
    if guarantee != "monotonic-reads" or value_of("PINNING_POSITIONS") is not False:
        return
    if not conf.readonly_aliases:
        return
    yield warning(
        "W014",
        f"PINNING_CONSISTENCY is {guarantee!r} but PINNING_POSITIONS is False: without "
        "positions it is unknown what a client has read, and only its writes pin it.",
        "Remove PINNING_POSITIONS or PINNING_CONSISTENCY.",
    )
