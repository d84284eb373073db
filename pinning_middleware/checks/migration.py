"""What other packages, and routers written by hand, have left beside this one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from django.apps import apps
from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage
from django.db import DEFAULT_DB_ALIAS, router
from django.utils.module_loading import import_string

from pinning_middleware.conf import OLDER, conf
from pinning_middleware.routers import PinningRouter

__all__ = ["check_leftovers"]

OTHERS: Final = ("multidb", "django_replicated")
INSTEAD: Final = {
    "DATABASE_ROUTERS": "pinning_middleware.routers.PinningRouter",
    "MIDDLEWARE": "pinning_middleware.middleware.PinningMiddleware",
}
# For sites that keep the names of django-multidb-router.
_BY_NAME: Final = "pinning_middleware.contrib."
SETTINGS: Final = {
    **{older: ours for ours, olders in OLDER.items() for older in olders},
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
_READ: Final = frozenset(older for olders in OLDER.values() for older in olders)
# The package's own older interface reads it as well.
_KEPT: Final = ("SLAVE_DATABASES",)
_NOTHING: Final = "Remove it: what it was for is done without it."
# A router may choose by chance.
_TIMES: Final = 16


def check_leftovers(**kwargs: Any) -> list[CheckMessage]:
    return [*_settings(), *_entries(), *_routers()]


def _warning(number: int, says: str, hint: str) -> checks.Warning:
    return checks.Warning(says, hint=hint, id=f"pinning_middleware.W{number}")


def _settings() -> Iterator[CheckMessage]:
    for name, ours in SETTINGS.items():
        if name in _KEPT or not hasattr(settings, name):
            continue
        is_read = name in _READ and conf.reads_older
        if is_read and not hasattr(settings, ours):
            continue
        why = f"{ours} is set, so that this is not read." if is_read else "Nothing here reads it."
        hint = f"Write {ours} instead, and remove it." if ours else _NOTHING
        yield _warning(201, f"{name} is a setting of another package. {why}", hint)


def _entries() -> Iterator[CheckMessage]:
    for setting, instead in INSTEAD.items():
        for entry in getattr(settings, setting):
            package = _package_of(entry)
            if package is None:
                continue
            hint = f"Write {instead!r} instead, as the first entry."
            if package == "multidb" and isinstance(entry, str) and entry.startswith("multidb."):
                hint += f" To keep its names for now: {_BY_NAME + entry!r}."
            says = f"{setting} has {_name_of(entry)!r}, which is of {package!r}, beside ours."
            yield _warning(202, says, hint)


def _package_of(entry: Any) -> str | None:
    """Return the other package that this entry, or a class that it is derived from, is of."""
    kind = entry
    if isinstance(entry, str):
        if entry.partition(".")[0] in OTHERS:
            return entry.partition(".")[0]
        try:
            kind = import_string(entry)
        except ImportError:
            return None
    bases = getattr(kind if isinstance(kind, type) else type(kind), "__mro__", ())
    packages = (base.__module__.partition(".")[0] for base in bases)
    return next((package for package in packages if package in OTHERS), None)


def _name_of(entry: Any) -> str:
    return entry if isinstance(entry, str) else type(entry).__name__


def _routers() -> Iterator[CheckMessage]:
    """Find routers that send a model's reads elsewhere than its writes, as only ours should."""
    for other in router.routers:
        if isinstance(other, PinningRouter) or _package_of(other) is not None:
            continue
        found: dict[str, set[str]] = {}
        for model in apps.get_models():
            if (primary := _ask(other, "db_for_write", model)) is None:
                # Of what it does not write, who says that others do?
                continue
            primary = primary or DEFAULT_DB_ALIAS
            aliases = {_ask(other, "db_for_read", model) for _ in range(_TIMES)}
            replicas = {alias for alias in aliases if alias and alias != primary}
            # Those that we know of are another check's matter.
            if replicas - conf.primary_of.keys():
                found.setdefault(primary, set()).update(replicas)
        if found:
            pools = {primary: sorted(replicas) for primary, replicas in found.items()}
            value = pools.get(DEFAULT_DB_ALIAS) if len(pools) == 1 else None
            yield _warning(
                203,
                f"{type(other).__name__} sends reads to replicas, and knows nothing of pins.",
                f"Write PINNING_REPLICAS = {value or pools!r}, and {INSTEAD['DATABASE_ROUTERS']!r} "
                "first in DATABASE_ROUTERS; keep of this router only which primary a model is of.",
            )


def _ask(other: Any, action: str, model: Any) -> str | None:
    """Return its answer, empty where it leaves that to others; ``None``: it can't be asked."""
    try:
        alias = getattr(other, action)(model)
    except Exception:
        # One that has no such method, or wants more than this, says nothing here.
        return None
    return str(alias) if alias else ""
