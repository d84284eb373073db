"""Leftover settings of other packages, and routers of one's own, beside this package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage
from django.db import DEFAULT_DB_ALIAS, router
from django.utils.module_loading import import_string

from pinning_middleware.checks.messages import warning
from pinning_middleware.checks.router_code import aliases_in_code
from pinning_middleware.conf import MULTIDB_ALIASES, conf
from pinning_middleware.routers import PinningRouter

OTHER_PACKAGES: Final = ("multidb", "django_replicated")
REPLACEMENTS: Final = {
    "DATABASE_ROUTERS": "pinning_middleware.routers.PinningRouter",
    "MIDDLEWARE": "pinning_middleware.middleware.PinningMiddleware",
}
# The same names as those of django-multidb-router.
_CONTRIB: Final = "pinning_middleware.contrib."
SETTINGS: Final = {
    **{legacy: name for name, legacy_names in MULTIDB_ALIASES.items() for legacy in legacy_names},
    "REPLICATED_DATABASE_SLAVES": "PINNING_REPLICAS",
    "REPLICATED_DATABASE_DOWNTIME": "PINNING_RETRY_AFTER",
    "REPLICATED_FORCE_MASTER_COOKIE_NAME": "PINNING_COOKIE_NAME (a name of its own)",
    "REPLICATED_FORCE_MASTER_COOKIE_MAX_AGE": "PINNING_SECONDS",
    "REPLICATED_VIEWS_OVERRIDES": "use_primary or offload, as decorators of these views",
    "REPLICATED_CACHE_BACKEND": "",
    "REPLICATED_READ_ONLY_DOWNTIME": "",
    "REPLICATED_READ_ONLY_TRIES": "",
    "REPLICATED_FORCE_STATE_HEADER": "",
    "REPLICATED_FORCE_MASTER_COOKIE_STATUS_CODES": "",
    "REPLICATED_CHECK_STATE_ON_WRITE": "",
    "REPLICATED_MANAGE_ATOMIC_REQUESTS": "",
}
_READ: Final = frozenset(legacy for names in MULTIDB_ALIASES.values() for legacy in names)
# The legacy interface of this package reads it as well.
_KEPT: Final = ("SLAVE_DATABASES",)
_NO_REPLACEMENT: Final = "Remove it: this package needs no such setting."
# A router may choose at random.
_TIMES: Final = 16


def check_leftovers(**kwargs: Any) -> list[CheckMessage]:
    return [*_settings(), *_entries(), *_routers()]


def _settings() -> Iterator[CheckMessage]:
    for name, replacement in SETTINGS.items():
        if name in _KEPT or not hasattr(settings, name):
            continue
        is_read = name in _READ and conf.uses_multidb_names
        if is_read and not hasattr(settings, replacement):
            continue
        reason = f"{replacement} takes precedence" if is_read else "it is not used here"
        hint = f"Set {replacement} instead, and remove it." if replacement else _NO_REPLACEMENT
        yield warning("W201", f"{name} is a setting of another package: {reason}.", hint)


def _entries() -> Iterator[CheckMessage]:
    for setting, instead in REPLACEMENTS.items():
        for entry in getattr(settings, setting):
            package = _package_of(entry)
            if package is None:
                continue
            hint = f"Set {instead!r} instead, as the first entry."
            if package == "multidb" and isinstance(entry, str) and entry.startswith("multidb."):
                hint += f" To keep its names, set {_CONTRIB + entry!r}."
            message = f"{setting} contains {_name_of(entry)!r} of {package!r}."
            yield warning("W202", message, hint)


def _package_of(entry: Any) -> str | None:
    """Return the other package that defines this entry, or a class that it is derived from."""
    kind = entry
    if isinstance(entry, str):
        if entry.partition(".")[0] in OTHER_PACKAGES:
            return entry.partition(".")[0]
        try:
            kind = import_string(entry)
        except ImportError:
            return None
    bases = getattr(kind if isinstance(kind, type) else type(kind), "__mro__", ())
    packages = (base.__module__.partition(".")[0] for base in bases)
    return next((package for package in packages if package in OTHER_PACKAGES), None)


def _name_of(entry: Any) -> str:
    return entry if isinstance(entry, str) else type(entry).__name__


def _routers() -> Iterator[CheckMessage]:
    """Find routers that return other databases for reads than for writes of a model."""
    for other in router.routers:
        if isinstance(other, PinningRouter) or _package_of(other) is not None:
            continue
        found: dict[str, set[str]] = {}
        for model in apps.get_models():
            if (written := _call_router(other, "db_for_write", model)) is None:
                # A database that it does not write may be a separate one.
                continue
            primary = written or DEFAULT_DB_ALIAS
            aliases = {_call_router(other, "db_for_read", model) for _ in range(_TIMES)}
            replicas = {
                alias
                for alias in aliases
                if alias and alias != primary and (written or _may_replicate(alias, primary))
            }
            # W011 reports replicas of PINNING_REPLICAS.
            if replicas - conf.primary_by_replica.keys():
                found.setdefault(primary, set()).update(replicas)
        if not found and (replicas := _replicas_in_code(other)):
            found = {DEFAULT_DB_ALIAS: replicas}
        if found:
            pools = {primary: sorted(replicas) for primary, replicas in found.items()}
            value = pools.get(DEFAULT_DB_ALIAS) if len(pools) == 1 else None
            yield warning(
                "W203",
                f"{type(other).__name__} returns replicas for reads without regard to pins.",
                f"Set PINNING_REPLICAS = {value or pools!r} and "
                f"{REPLACEMENTS['DATABASE_ROUTERS']!r} as the first entry of DATABASE_ROUTERS. "
                "This router should only return which primary a model belongs to.",
            )


def _may_replicate(alias: str, primary: str) -> bool:
    """Return whether an alias may be a replica: the name of its database is the same."""
    first, second = (settings.DATABASES.get(each, {}) for each in (alias, primary))
    return all(first.get(name) == second.get(name) for name in ("ENGINE", "NAME"))


def _replicas_in_code(other: Any) -> set[str]:
    """Return the aliases that a router names for reads only, in some requests for example."""
    answers = {_call_router(other, "db_for_write", model) for model in apps.get_models()}
    if None in answers:
        # A database that it does not write may be a separate one.
        return set()
    read, written = (
        set(aliases_in_code(other, action, settings.DATABASES))
        for action in ("db_for_read", "db_for_write")
    )
    found = read - written - answers - {DEFAULT_DB_ALIAS} - conf.primary_by_replica.keys()
    if any(answers):
        return found
    # It writes nothing, so these may be databases of other applications.
    return {alias for alias in found if _may_replicate(alias, DEFAULT_DB_ALIAS)}


def _call_router(other: Any, action: str, model: Any) -> str | None:
    """Return its answer, "" if it has none, or None if it cannot be called."""
    try:
        alias = getattr(other, action)(model)
    except Exception:
        # It has no such method, or needs hints.
        return None
    return str(alias) if alias else ""
