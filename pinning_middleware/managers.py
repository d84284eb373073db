"""
The legacy interface: a manager and a mixin that read from replicas and write to ``default``,
without the router and the middleware. If those are installed, their pins count here too.
"""

from __future__ import annotations

from typing import Any, TypeVar

from django.db import DEFAULT_DB_ALIAS, models

from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.route import route
from pinning_middleware.scopes.scope import current_scope

__all__ = [
    "ReplicaManager",
    "ReplicaMixin",
    "ReplicaQuerySet",
    "SlaveManager",
    "SlaveMixin",
    "SlaveQuerySet",
]

T = TypeVar("T", bound=models.Model)


class ReplicaQuerySet(models.QuerySet[T]):
    """Reads from replicas, round robin, and writes to ``default``, unless ``using()`` is called."""

    # Attributes of Django's querysets that its stubs lack.
    _db: str | None
    _for_write: bool
    _hints: dict[str, Any]
    # The selected replica.
    _chosen: str | None = None

    @property
    def db(self) -> str:
        """The database that this queryset uses if it runs now."""
        if self._db:
            return super().db
        if self._for_write:
            return DEFAULT_DB_ALIAS
        pool, scope = pools().legacy, current_scope()
        instance = self._hints.get("instance")
        if instance is not None and instance._state.db not in pool:
            return super().db
        if not scope.is_ambient or not pool.is_legacy:
            return route(pool, self.model)
        # Outside a scope each queryset uses the next replica. `db` is read several times for one
        # read.
        scope.keep_replica(pool.key, self._chosen)
        alias = route(pool, self.model)
        if alias in pool.replicas:
            self._chosen = alias
        return alias


class ReplicaManager(models.Manager[T]):
    """The manager of ``ReplicaQuerySet``."""

    _queryset_class = ReplicaQuerySet

    @property
    def db(self) -> str:
        """The database that the manager's querysets read from."""
        return self.get_queryset().db


class ReplicaMixin:
    """For models, before ``models.Model``: writes go to ``default`` unless ``using`` is given."""

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save to ``using``, by default ``default``, regardless of the instance's alias."""
        # `using` is the third of the positional arguments that Django 5.2 still takes.
        if len(args) < 3 and kwargs.get("using") is None:
            kwargs["using"] = DEFAULT_DB_ALIAS
        super().save(*args, **kwargs)  # type: ignore[misc]

    def delete(self, using: Any = None, keep_parents: bool = False) -> tuple[int, dict[str, int]]:
        """Delete from ``using``, by default ``default``, regardless of the instance's alias."""
        deleted: tuple[int, dict[str, int]] = super().delete(  # type: ignore[misc]
            using=using or DEFAULT_DB_ALIAS, keep_parents=keep_parents
        )
        return deleted


SlaveManager = ReplicaManager
SlaveMixin = ReplicaMixin
SlaveQuerySet = ReplicaQuerySet
