"""The settings, cached until `setting_changed`. They are validated in `checks` only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from django.conf import global_settings, settings
from django.core.signals import setting_changed
from django.db import DEFAULT_DB_ALIAS
from django.utils.module_loading import import_string

from pinning_middleware.pins import PoolKey
from pinning_middleware.pool_specs import PoolSpec, parse_dry_run, parse_pools

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.http import HttpRequest

T = TypeVar("T")

logger = logging.getLogger("pinning_middleware")

DEFAULTS: dict[str, Any] = {
    "PINNING_REPLICAS": [],
    "PINNING_SECONDS": 15,
    "PINNING_POSITIONS": True,
    "PINNING_WAIT": 0,
    "PINNING_STORES": ["pinning_middleware.stores.CookieStore"],
    "PINNING_COOKIE_NAME": "pinning",
    "PINNING_COOKIE_DOMAIN": None,
    "PINNING_COOKIE_PATH": None,
    "PINNING_COOKIE_SECURE": None,
    "PINNING_COOKIE_SAMESITE": None,
    "PINNING_COOKIE_HTTPONLY": True,
    "PINNING_HEADER_NAME": "Pinning-Token",
    "PINNING_CACHE": "default",
    "PINNING_USER_KEY": "pinning_middleware.stores.user_key",
    "PINNING_PRIMARY_METHODS": ("POST", "PUT", "PATCH", "DELETE"),
    "PINNING_BALANCE_BY": "request",
    "PINNING_IGNORED_TABLES": (),
    "PINNING_MAX_LAG": None,
    "PINNING_OFFLOAD": True,
    "PINNING_OFFLOAD_OUTSIDE_REQUESTS": True,
    "PINNING_PRIMARY_MODELS": (),
    "PINNING_RETRY_AFTER": 10,
    "PINNING_PRIMARY_DOWN": "error",
    "PINNING_CONSISTENCY": "read-your-writes",
    "PINNING_RETRY_404": False,
    "PINNING_DRY_RUN": None,
    "PINNING_WRITING_FUNCTIONS": (),
    "PINNING_SESSION_SETUP": None,
    "PINNING_ENABLED": True,
}

# Names of the settings in django-multidb-router. They are read only if the site uses
# `contrib.multidb` and does not set the name of this package.
MULTIDB_ALIASES: dict[str, tuple[str, ...]] = {
    "PINNING_REPLICAS": ("REPLICA_DATABASES", "SLAVE_DATABASES"),
    "PINNING_SECONDS": ("MULTIDB_PINNING_SECONDS",),
    "PINNING_COOKIE_NAME": ("MULTIDB_PINNING_COOKIE",),
    "PINNING_COOKIE_SECURE": ("MULTIDB_PINNING_COOKIE_SECURE",),
    "PINNING_COOKIE_SAMESITE": ("MULTIDB_PINNING_COOKIE_SAMESITE",),
    "PINNING_COOKIE_HTTPONLY": ("MULTIDB_PINNING_COOKIE_HTTPONLY",),
}
# Its different defaults: old and new processes share a cookie during a deployment.
MULTIDB_DEFAULTS: dict[str, Any] = {
    "PINNING_COOKIE_NAME": "multidb_pin_writes",
    "PINNING_COOKIE_HTTPONLY": False,
}

# The share of requests that PINNING_RETRY_404 = True may run again.
RETRY_404_SHARE: Final = 0.05


def _setting(name: str, convert: Callable[[Any], T]) -> cached_property[T]:
    """Return an attribute of `Conf` for the converted value of one setting."""
    return cached_property(lambda conf: convert(conf._get(name)))


def _in_lower_case(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.lower() for name in names)


class Conf:
    """
    The settings as the package uses them. Each attribute is computed once, until a setting is
    changed by `override_settings`.
    """

    enabled = _setting("PINNING_ENABLED", bool)
    seconds = _setting("PINNING_SECONDS", float)
    wait = _setting("PINNING_WAIT", float)
    retry_after = _setting("PINNING_RETRY_AFTER", float)
    header_name = _setting("PINNING_HEADER_NAME", str)
    cache = _setting("PINNING_CACHE", str)
    primary_methods = _setting("PINNING_PRIMARY_METHODS", frozenset[str])
    # Labels of apps and models.
    primary_models = _setting("PINNING_PRIMARY_MODELS", _in_lower_case)
    ignored_tables = _setting("PINNING_IGNORED_TABLES", _in_lower_case)
    offload_outside = _setting("PINNING_OFFLOAD_OUTSIDE_REQUESTS", bool)
    balance_by_query = _setting("PINNING_BALANCE_BY", lambda value: bool(value == "query"))
    balance_by_user = _setting("PINNING_BALANCE_BY", lambda value: bool(value == "user"))
    monotonic_reads = _setting(
        "PINNING_CONSISTENCY", lambda value: bool(value == "monotonic-reads")
    )

    def effective_name(self, name: str) -> str:
        """Return the name under which the site sets this: `name`, or one of `MULTIDB_ALIASES`."""
        if name not in MULTIDB_ALIASES or not self.uses_multidb_names or hasattr(settings, name):
            return name
        return next((a for a in MULTIDB_ALIASES[name] if hasattr(settings, a)), name)

    def _get(self, name: str) -> Any:
        if hasattr(settings, effective := self.effective_name(name)):
            return getattr(settings, effective)
        defaults = MULTIDB_DEFAULTS if self.uses_multidb_names else DEFAULTS
        return defaults.get(name, DEFAULTS[name])

    @cached_property
    def uses_multidb_names(self) -> bool:
        """Whether the site uses `contrib.multidb`, and so the names of django-multidb-router."""
        paths = [*settings.DATABASE_ROUTERS, *settings.MIDDLEWARE]
        within = f"{__package__}.contrib.multidb."
        return any(isinstance(path, str) and path.startswith(within) for path in paths)

    def _cookie(self, attribute: str) -> Any:
        own = self._get(f"PINNING_COOKIE_{attribute}")
        return getattr(settings, f"SESSION_COOKIE_{attribute}") if own is None else own

    @property
    def debug(self) -> bool:
        # Not cached: a change of DEBUG must not reset the listeners of `on_change`.
        return bool(settings.DEBUG)

    @cached_property
    def replicas(self) -> dict[str, dict[str, int]]:
        """Primary's alias → {replica's alias: weight}."""
        return {spec.key.primary: dict(spec.weights) for spec in self._specs}

    @cached_property
    def _specs(self) -> tuple[PoolSpec, ...]:
        try:
            return parse_pools(self._get("PINNING_REPLICAS"))
        except ValueError as error:
            # Raised here, it would prevent the system check from reporting it with a hint.
            logger.error("PINNING_REPLICAS %s. All reads go to the primary.", error)
            return ()

    @cached_property
    def dry_run(self) -> dict[str, float]:
        """Primary's alias → the lag that PINNING_DRY_RUN assumes (seconds)."""
        try:
            return parse_dry_run(self._get("PINNING_DRY_RUN"))
        except ValueError as error:
            logger.error("PINNING_DRY_RUN %s. There is no dry run.", error)
            return {}

    @cached_property
    def slave_databases(self) -> list[str] | None:
        """The legacy interface's list of replicas, or None if not set, or invalid (E004)."""
        value = getattr(settings, "SLAVE_DATABASES", None)
        return list(value) if isinstance(value, (list, tuple, set, frozenset)) else None

    @cached_property
    def pools(self) -> tuple[PoolSpec, ...]:
        """The pools that have replicas, and those of a dry run."""
        specs = tuple(spec for spec in self._specs if spec.weights)
        real = {spec.key.primary for spec in specs}
        if self.dry_run and self.slave_databases:
            real.add(DEFAULT_DB_ALIAS)
        return (
            *specs,
            *(
                PoolSpec(PoolKey(primary), {}, assumed_lag=lag)
                for primary, lag in self.dry_run.items()
                if primary not in real
            ),
        )

    @cached_property
    def legacy_pool(self) -> PoolSpec:
        """The pool of the legacy interface's managers."""
        own = next((spec for spec in self.pools if spec.key.primary == DEFAULT_DB_ALIAS), None)
        if self.slave_databases is None:
            return own or PoolSpec(PoolKey(DEFAULT_DB_ALIAS), {})
        weights = dict.fromkeys(self.slave_databases, 1)
        if own is not None and own.weights == weights and not own.placements:
            return own
        # A separate rotation needs a separate state in the scope. The pins are the same.
        return PoolSpec(PoolKey(DEFAULT_DB_ALIAS, legacy=True), weights)

    @cached_property
    def pools_by_primary(self) -> dict[str, tuple[PoolSpec, ...]]:
        """Primary's alias → the pools that its writes pin."""
        pools: dict[str, tuple[PoolSpec, ...]] = {spec.key.primary: (spec,) for spec in self.pools}
        legacy = self.legacy_pool
        if legacy.weights and legacy not in self.pools:
            pools[legacy.key.primary] = (*pools.get(legacy.key.primary, ()), legacy)
        return pools

    @cached_property
    def readonly_aliases(self) -> dict[str, str]:
        """
        Replica's alias → its primary's alias. Aliases listed only in SLAVE_DATABASES are writable,
        and their instances keep them.
        """
        return {alias: spec.key.primary for spec in self.pools for alias in spec.weights}

    @cached_property
    def primary_by_replica(self) -> dict[str, str]:
        """Replica's alias, also of the legacy interface → its primary's alias."""
        return {
            **dict.fromkeys(self.legacy_pool.weights, DEFAULT_DB_ALIAS),
            **self.readonly_aliases,
        }

    @cached_property
    def positions(self) -> bool | str:
        """True for the best method of the database, False for none, or the name of a method."""
        value = self._get("PINNING_POSITIONS")
        return value if isinstance(value, str) else bool(value)

    @cached_property
    def stores(self) -> tuple[Any, ...]:
        """An instance of each store, in the order of the setting."""
        return tuple(import_string(path)() for path in self._get("PINNING_STORES"))

    @cached_property
    def seen_cookie_name(self) -> str:
        """The cookie of the positions that a client has read, with monotonic-reads."""
        return f"{self.cookie_name}-seen"

    @cached_property
    def stores_at_start(self) -> tuple[Any, ...]:
        """The stores that are loaded before any other middleware."""
        return tuple(store for store in self.stores if not store.after_authentication)

    @cached_property
    def stores_at_view(self) -> tuple[Any, ...]:
        """The stores that are loaded after authentication."""
        return tuple(store for store in self.stores if store.after_authentication)

    @cached_property
    def cookie_name(self) -> str:
        """
        PINNING_COOKIE_NAME. By default it follows a custom SESSION_COOKIE_NAME, since
        another site on the same domain would otherwise read and overwrite the cookie.
        """
        name = str(self._get("PINNING_COOKIE_NAME"))
        session = settings.SESSION_COOKIE_NAME
        if (
            hasattr(settings, "PINNING_COOKIE_NAME")
            or self.uses_multidb_names
            or session == global_settings.SESSION_COOKIE_NAME
        ):
            return name
        return f"{session}-{name}"

    @cached_property
    def session_cookie_name(self) -> str:
        return str(settings.SESSION_COOKIE_NAME)

    @cached_property
    def cookie(self) -> dict[str, Any]:
        """The constant keyword arguments of `HttpResponse.set_cookie`."""
        return {
            "domain": self._cookie("DOMAIN"),
            "path": self._cookie("PATH"),
            "secure": self._cookie("SECURE"),
            "samesite": self._cookie("SAMESITE"),
            "httponly": bool(self._get("PINNING_COOKIE_HTTPONLY")),
        }

    @cached_property
    def key(self) -> Callable[[HttpRequest], str | None]:
        function: Callable[[HttpRequest], str | None] = import_string(self._get("PINNING_USER_KEY"))
        return function

    @cached_property
    def writing_functions(self) -> frozenset[str]:
        """Names of database functions that write, in upper case and without their schema."""
        names = self._get("PINNING_WRITING_FUNCTIONS")
        return frozenset(name.rpartition(".")[2].upper() for name in names)

    @cached_property
    def session_setup(self) -> Callable[[BaseDatabaseWrapper], Any] | None:
        path = self._get("PINNING_SESSION_SETUP")
        return None if path is None else import_string(path)

    @cached_property
    def max_lag(self) -> float | None:
        value = self._get("PINNING_MAX_LAG")
        return None if value is None else float(value)

    @cached_property
    def offload(self) -> bool | Callable[[HttpRequest], Any]:
        value = self._get("PINNING_OFFLOAD")
        return import_string(value) if isinstance(value, str) else bool(value)

    @cached_property
    def primary_down(self) -> Literal["error", "stale"]:
        return "stale" if self._get("PINNING_PRIMARY_DOWN") == "stale" else "error"

    @cached_property
    def retry_404(self) -> float:
        """The share of requests whose view may be run again on the primary; 0 for none."""
        value = self._get("PINNING_RETRY_404")
        return RETRY_404_SHARE if value is True else float(value)


conf = Conf()
_listeners: list[Callable[[], None]] = []


def on_change(listener: Callable[[], None]) -> Callable[[], None]:
    """Call `listener` whenever settings change, after `conf` has dropped the old ones."""
    _listeners.append(listener)
    return listener


def _forget(*, setting: str, **kwargs: Any) -> None:
    if setting.startswith(_PREFIXES) or setting in _RELATED:
        conf.__dict__.clear()
        for listener in _listeners:
            listener()


_PREFIXES = ("PINNING_", "SESSION_COOKIE_", "MULTIDB_PINNING_")
_RELATED: Sequence[str] = (
    *("REPLICA_DATABASES", "SLAVE_DATABASES"),
    *("DATABASES", "CACHES", "DATABASE_ROUTERS", "MIDDLEWARE"),
)

setting_changed.connect(_forget, dispatch_uid="pinning_middleware.conf")
