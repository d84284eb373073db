"""The settings, each read once and forgotten on ``setting_changed``. Judged in ``checks`` only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from django.conf import settings
from django.core.signals import setting_changed
from django.db import DEFAULT_DB_ALIAS
from django.utils.module_loading import import_string

if TYPE_CHECKING:
    from django.http import HttpRequest

logger = logging.getLogger("pinning_middleware")

__all__ = ["DEFAULTS", "Conf", "PoolSpec", "conf", "on_change", "parse_replicas"]

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
    "PINNING_ENABLED": True,
}

# What django-multidb-router calls them. Read only where a site names `contrib.multidb` in its
# settings, and ours is not set.
OLDER: dict[str, tuple[str, ...]] = {
    "PINNING_REPLICAS": ("REPLICA_DATABASES", "SLAVE_DATABASES"),
    "PINNING_SECONDS": ("MULTIDB_PINNING_SECONDS",),
    "PINNING_COOKIE_NAME": ("MULTIDB_PINNING_COOKIE",),
    "PINNING_COOKIE_SECURE": ("MULTIDB_PINNING_COOKIE_SECURE",),
    "PINNING_COOKIE_SAMESITE": ("MULTIDB_PINNING_COOKIE_SAMESITE",),
    "PINNING_COOKIE_HTTPONLY": ("MULTIDB_PINNING_COOKIE_HTTPONLY",),
}
# Where its defaults differ: processes of before and after a deployment share one cookie.
OLDER_DEFAULTS: dict[str, Any] = {
    "PINNING_COOKIE_NAME": "multidb_pin_writes",
    "PINNING_COOKIE_HTTPONLY": False,
}


class PoolSpec(NamedTuple):
    """A pool as the settings describe it. Its key in a scope begins with the primary's alias."""

    key: str
    primary: str
    weights: Mapping[str, int]


def parse_replicas(value: object) -> dict[str, dict[str, int]]:
    """
    Return ``PINNING_REPLICAS`` in its longest form: primary alias → {replica alias: weight}.

    ``ValueError``, with a sentence for people, where it has none of its three forms.
    """
    if isinstance(value, (list, tuple)):
        value = {DEFAULT_DB_ALIAS: value} if value else {}
    if not isinstance(value, Mapping):
        raise ValueError("it must be a list of aliases, or a mapping of a primary's alias to one")
    pools: dict[str, dict[str, int]] = {}
    for primary, replicas in value.items():
        if isinstance(replicas, (list, tuple)):
            if not all(isinstance(alias, str) for alias in replicas):
                raise ValueError("aliases must be text")
            if len(set(replicas)) != len(replicas):
                raise ValueError(f"a replica of {primary!r} is named twice; use {{alias: weight}}")
            replicas = dict.fromkeys(replicas, 1)
        if not isinstance(replicas, Mapping):
            raise ValueError(f"the replicas of {primary!r} must be a list or {{alias: weight}}")
        for alias, weight in replicas.items():
            if not isinstance(alias, str) or not isinstance(primary, str):
                raise ValueError("aliases must be text")
            if not isinstance(weight, int) or isinstance(weight, bool) or weight < 0:
                raise ValueError(
                    f"the weight of {alias!r} must be a whole number, 0 to watch it without use"
                )
        pools[primary] = dict(replicas)
    return pools


class Conf:
    """
    The settings as the package uses them. Reading an attribute computes it once; a change of
    any setting through ``override_settings`` starts anew.
    """

    def _get(self, name: str) -> Any:
        if name in OLDER and self.reads_older and not hasattr(settings, name):
            for older in OLDER[name]:
                if hasattr(settings, older):
                    return getattr(settings, older)
            return OLDER_DEFAULTS.get(name, DEFAULTS[name])
        return getattr(settings, name, DEFAULTS[name])

    @cached_property
    def reads_older(self) -> bool:
        """Whether the site came from django-multidb-router, and names what stands in for it."""
        paths = [*settings.DATABASE_ROUTERS, *settings.MIDDLEWARE]
        within = f"{__package__}.contrib.multidb."
        return any(isinstance(path, str) and path.startswith(within) for path in paths)

    def _cookie(self, attribute: str) -> Any:
        own = self._get(f"PINNING_COOKIE_{attribute}")
        return getattr(settings, f"SESSION_COOKIE_{attribute}") if own is None else own

    @property
    def debug(self) -> bool:
        # Not kept: a change of it is no reason to forget what is known of servers.
        return bool(settings.DEBUG)

    @cached_property
    def enabled(self) -> bool:
        return bool(self._get("PINNING_ENABLED"))

    @cached_property
    def replicas(self) -> dict[str, dict[str, int]]:
        try:
            return parse_replicas(self._get("PINNING_REPLICAS"))
        except ValueError as error:
            # Raised here it would keep the system check from saying it with a hint.
            logger.error("PINNING_REPLICAS: %s. Every read goes to the primary.", error)
            return {}

    @cached_property
    def slave_databases(self) -> list[str] | None:
        """The older interface's list of replicas; ``None`` where the site does not set it."""
        value = getattr(settings, "SLAVE_DATABASES", None)
        return None if value is None else list(value)

    @cached_property
    def pools(self) -> tuple[PoolSpec, ...]:
        return tuple(PoolSpec(primary, primary, w) for primary, w in self.replicas.items() if w)

    @cached_property
    def legacy_pool(self) -> PoolSpec:
        """The pool of the older interface's managers."""
        own = next((spec for spec in self.pools if spec.primary == DEFAULT_DB_ALIAS), None)
        if self.slave_databases is None:
            return own or PoolSpec(DEFAULT_DB_ALIAS, DEFAULT_DB_ALIAS, {})
        weights = dict.fromkeys(self.slave_databases, 1)
        if own is not None and own.weights == weights:
            return own
        # Another rotation, so another place in the scope's state; the pins are the same.
        return PoolSpec(f"{DEFAULT_DB_ALIAS}\0SLAVE_DATABASES", DEFAULT_DB_ALIAS, weights)

    @cached_property
    def watched(self) -> dict[str, tuple[PoolSpec, ...]]:
        """Alias of a primary → the pools that its writes pin."""
        watched: dict[str, tuple[PoolSpec, ...]] = {spec.primary: (spec,) for spec in self.pools}
        legacy = self.legacy_pool
        if legacy.weights and legacy not in self.pools:
            watched[legacy.primary] = (*watched.get(legacy.primary, ()), legacy)
        return watched

    @cached_property
    def guarded(self) -> dict[str, str]:
        """
        Alias of a replica → its primary's. Those that only ``SLAVE_DATABASES`` names stay
        writable, and keep their instances.
        """
        return {alias: spec.primary for spec in self.pools for alias in spec.weights}

    @cached_property
    def primary_of(self) -> dict[str, str]:
        """Alias of a replica, of the older interface too → its primary's."""
        return {**dict.fromkeys(self.legacy_pool.weights, DEFAULT_DB_ALIAS), **self.guarded}

    @cached_property
    def seconds(self) -> float:
        return float(self._get("PINNING_SECONDS"))

    @cached_property
    def positions(self) -> bool | str:
        """``True``: the best way that the database has; ``"lsn"``, ``"gtid"``, ``"xid"``: that."""
        value = self._get("PINNING_POSITIONS")
        return value if isinstance(value, str) else bool(value)

    @cached_property
    def wait(self) -> float:
        return float(self._get("PINNING_WAIT"))

    @cached_property
    def stores(self) -> tuple[Any, ...]:
        """An instance of each store, in the order of the setting."""
        return tuple(import_string(path)() for path in self._get("PINNING_STORES"))

    @cached_property
    def seen_cookie_name(self) -> str:
        """The cookie of what a client has seen, under ``monotonic-reads``."""
        return f"{self.cookie_name}-seen"

    @cached_property
    def stores_at_start(self) -> tuple[Any, ...]:
        """Those that are asked before any other middleware."""
        return tuple(store for store in self.stores if not store.after_authentication)

    @cached_property
    def stores_at_view(self) -> tuple[Any, ...]:
        """Those that are asked after authentication."""
        return tuple(store for store in self.stores if store.after_authentication)

    @cached_property
    def cookie_name(self) -> str:
        return str(self._get("PINNING_COOKIE_NAME"))

    @cached_property
    def cookie(self) -> dict[str, Any]:
        """The keyword arguments of ``HttpResponse.set_cookie`` that do not vary."""
        return {
            "domain": self._cookie("DOMAIN"),
            "path": self._cookie("PATH"),
            "secure": self._cookie("SECURE"),
            "samesite": self._cookie("SAMESITE"),
            "httponly": bool(self._get("PINNING_COOKIE_HTTPONLY")),
        }

    @cached_property
    def header_name(self) -> str:
        return str(self._get("PINNING_HEADER_NAME"))

    @cached_property
    def cache(self) -> str:
        return str(self._get("PINNING_CACHE"))

    @cached_property
    def key(self) -> Callable[[HttpRequest], str | None]:
        function: Callable[[HttpRequest], str | None] = import_string(self._get("PINNING_USER_KEY"))
        return function

    @cached_property
    def primary_methods(self) -> frozenset[str]:
        return frozenset(self._get("PINNING_PRIMARY_METHODS"))

    @cached_property
    def spread_by_query(self) -> bool:
        return bool(self._get("PINNING_BALANCE_BY") == "query")

    @cached_property
    def ignored_tables(self) -> frozenset[str]:
        return frozenset(table.lower() for table in self._get("PINNING_IGNORED_TABLES"))

    @cached_property
    def max_lag(self) -> float | None:
        value = self._get("PINNING_MAX_LAG")
        return None if value is None else float(value)

    @cached_property
    def offload(self) -> bool | Callable[[HttpRequest], Any]:
        value = self._get("PINNING_OFFLOAD")
        return import_string(value) if isinstance(value, str) else bool(value)

    @cached_property
    def offload_outside(self) -> bool:
        return bool(self._get("PINNING_OFFLOAD_OUTSIDE_REQUESTS"))

    @cached_property
    def primary_models(self) -> frozenset[str]:
        """Labels of apps and of models, in lower case."""
        return frozenset(label.lower() for label in self._get("PINNING_PRIMARY_MODELS"))

    @cached_property
    def retry_after(self) -> float:
        return float(self._get("PINNING_RETRY_AFTER"))

    @cached_property
    def primary_down(self) -> Literal["error", "stale"]:
        return "stale" if self._get("PINNING_PRIMARY_DOWN") == "stale" else "error"

    @cached_property
    def monotonic_reads(self) -> bool:
        return bool(self._get("PINNING_CONSISTENCY") == "monotonic-reads")


conf = Conf()
_listeners: list[Callable[[], None]] = []


def on_change(listener: Callable[[], None]) -> Callable[[], None]:
    """Call this whenever the settings were changed, after ``conf`` has forgotten the old ones."""
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
