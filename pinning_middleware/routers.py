"""Django's questions, translated: which pool does this model belong to?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from django.db import router as django_router

from pinning_middleware.conf import conf, on_change
from pinning_middleware.routing.policy import Pool
from pinning_middleware.routing.pools import pools

if TYPE_CHECKING:
    from django.db.models import Model

__all__ = ["PinningRouter"]


class PinningRouter:
    """
    The first entry of ``DATABASE_ROUTERS``. Routers after it say which primary a model belongs
    to; what they do not answer belongs to the database of the hinted instance, else ``default``.
    """

    def __init__(self) -> None:
        _instances.add(self)

    def db_for_read(self, model: type[Model], **hints: Any) -> str | None:
        """Return the alias to read from, or ``None`` where no pool is concerned."""
        known = pools()
        if (
            type(self).db_for_read is PinningRouter.db_for_read
            and not self._others()
            and len(known.by_primary) == 1
            and known.default is not None
        ):
            # Every read of a site comes by here. Where there is nothing to translate, Django
            # asks the pool from now on; a subclass keeps its own say.
            self.db_for_read = known.default.db_for_read  # type: ignore[method-assign]
            return self.db_for_read(model, **hints)
        origin = _origin(hints)
        answer = self._ask("db_for_read", model, hints)
        pool = _pool_of(origin) if answer is None else known.by_primary.get(answer)
        if pool is None:
            return answer
        return pool.db_for_read(model, **hints) or pool.db_for_read(model)

    def db_for_write(self, model: type[Model], **hints: Any) -> str | None:
        """Return the primary to write to, or ``None`` where no pool is concerned."""
        answer = self._ask("db_for_write", model, hints)
        pool = _pool_of(_origin(hints)) if answer is None else pools().by_alias.get(answer)
        return answer if pool is None else pool.primary

    def allow_relation(self, obj1: Model, obj2: Model, **hints: Any) -> bool | None:
        """Return ``True`` for two objects of one pool."""
        known = pools().by_alias
        pool = known.get(obj1._state.db or "")
        return True if pool is not None and pool is known.get(obj2._state.db or "") else None

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        """Return ``False`` for a replica: its tables come from its primary."""
        return False if db in conf.guarded else None

    def _ask(self, action: str, model: type[Model], hints: dict[str, Any]) -> str | None:
        for router in self._others():
            method = getattr(router, action, None)
            if method is not None and (answer := method(model, **hints)):
                return str(answer)
        return None

    def _others(self) -> list[Any]:
        """Return the routers after this one."""
        routers = django_router.routers
        return routers[routers.index(self) + 1 :] if self in routers else []

    def _forget(self) -> None:
        self.__dict__.pop("db_for_read", None)


_instances: WeakSet[PinningRouter] = WeakSet()


@on_change
def _forget() -> None:
    for router in _instances:
        router._forget()


def _origin(hints: dict[str, Any]) -> str | None:
    instance = hints.get("instance")
    return None if instance is None else instance._state.db


def _pool_of(origin: str | None) -> Pool | None:
    known = pools()
    return known.default if origin is None else known.by_alias.get(origin)
