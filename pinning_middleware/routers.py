"""The database router: selects the pool of a model, and routes its reads."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from django.db import router as django_router

from pinning_middleware.backend.patches import require_app
from pinning_middleware.conf import conf
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.route import route

if TYPE_CHECKING:
    from django.db.models import Model

logger = logging.getLogger("pinning_middleware")

# Names of other routers' methods, each with the replica that it returned, that were logged.
_logged: set[tuple[str, str]] = set()


class PinningRouter:
    """
    The first entry of ``DATABASE_ROUTERS``.

    Later routers select the primary of a model. If they return None, it belongs to
    the database of the hinted instance, or else ``default``. Raise ImproperlyConfigured if the
    app is not installed: writes would not be detected.
    """

    def __init__(self) -> None:
        require_app("PinningRouter")

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        """
        Return the alias to read from, or None if the model belongs to no pool.

        ``model`` is a model class, but Django's own router accepts anything, so this one does.
        """
        answer, pool = self._select("db_for_read", model, hints)
        return answer if pool is None else route(pool, model)

    def db_for_write(self, model: Any, **hints: Any) -> str | None:
        """Return the primary to write to, or None if the model belongs to no pool."""
        answer, pool = self._select("db_for_write", model, hints)
        return answer if pool is None else pool.primary

    def allow_relation(self, obj1: Model, obj2: Model, **hints: Any) -> bool | None:
        """Return True for two objects of one pool, None otherwise."""
        known = pools().by_alias
        pool = known.get(obj1._state.db or "")
        return True if pool is not None and pool is known.get(obj2._state.db or "") else None

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        """Return False for a replica, whose tables come from its primary, None otherwise."""
        return False if db in conf.readonly_aliases else None

    def _select(
        self, action: str, model: Any, hints: dict[str, Any]
    ) -> tuple[str | None, Pool | None]:
        """
        Return the alias that the routers after this one return, and the pool that it belongs to.
        The alias of a replica selects its pool. Without an alias, the hinted instance does.
        """
        is_after = False
        for router in django_router.routers:
            if not is_after:
                is_after = router is self
                continue
            method = getattr(router, action, None)
            answer = None if method is None else method(model, **hints)
            if answer:
                alias = str(answer)
                if alias in conf.readonly_aliases:
                    _log_replica(router, action, alias)
                return alias, pools().by_alias.get(alias)
        state = getattr(hints.get("instance"), "_state", None)
        origin = None if state is None else state.db
        return None, pools().default if origin is None else pools().by_alias.get(origin)


def _log_replica(router: Any, action: str, alias: str) -> None:
    """
    Log, once in a process, that another router returns a replica. It may do so in some requests
    only, where system checks do not see it.
    """
    name = f"{type(router).__name__}.{action}()"
    if (name, alias) in _logged:
        return
    _logged.add((name, alias))
    logger.warning(
        "%s returns the replica %r. PinningRouter reads it as the primary %r, and selects the "
        "replica itself. Let %s return the primary.",
        *(name, alias, conf.readonly_aliases[alias], name),
        extra={"router": name, "alias": alias},
    )
