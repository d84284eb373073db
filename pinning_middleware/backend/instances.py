"""
Instances belong to their pool: one that is read from a replica has the primary's alias in
``_state.db``.

So ``only(…).get()`` followed by ``save()`` writes the fields that were loaded and no stale values
of the others, an instance from a replica may be added to a relation of one from the primary, and
what is pickled survives a change of replicas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from django.apps import apps
from django.db import router
from django.db.models import Model
from django.db.models.signals import class_prepared

from pinning_middleware.conf import conf
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.overrides import OverrideKind, pop, push


def install() -> None:
    """Wrap ``from_db()`` of every model class that has one of its own. Idempotent."""
    _wrap_from_db(Model)
    class_prepared.connect(_on_class, dispatch_uid="pinning_middleware.instances")
    for model in apps.get_models(include_auto_created=True):
        _on_class(model)


def _on_class(sender: type[Any], **kwargs: Any) -> None:
    for base in sender.__mro__:
        if "from_db" in vars(base):
            _wrap_from_db(base)


def _wrap_from_db(owner: type[Any]) -> None:
    original = getattr(vars(owner)["from_db"], "__func__", None)
    if original is None or hasattr(original, "pinning_original"):
        return

    # Called for every row, so it does nothing but a lookup.
    @functools.wraps(original)
    def from_db(cls: type[Model], db: str, *args: Any, **kwargs: Any) -> Model:
        instance: Model = original(cls, conf.readonly_aliases.get(db, db), *args, **kwargs)
        return instance

    from_db.pinning_original = original  # type: ignore[attr-defined]
    owner.from_db = classmethod(from_db)


def read_primary_while_saving(original: Callable[..., Any]) -> Callable[..., Any]:
    """
    Wrap ``Model.save_base()``, so that what it reads comes from the primary: deferred columns that
    are then written back, and what ``pre_save`` receivers look up.
    """

    def save_base(
        self: Any,
        raw: bool = False,
        force_insert: Any = False,
        force_update: bool = False,
        using: str | None = None,
        update_fields: Any = None,
    ) -> Any:
        using = using or router.db_for_write(type(self), instance=self)
        pool = pools().by_alias.get(using)
        if pool is None:
            return original(self, raw, force_insert, force_update, using, update_fields)
        owner = object()
        push(OverrideKind.SAVING, owner, pool.primary)
        try:
            return original(self, raw, force_insert, force_update, using, update_fields)
        finally:
            pop(owner)

    return save_base


def fetch_peers_by_route(original: Callable[..., Any]) -> Callable[..., Any]:
    """
    Wrap ``DeferredAttribute.fetch_many()``, which reads deferred fields from the database that the
    first instance belongs to and calls no router, unlike ``fetch_one()``.
    """

    def fetch_many(self: Any, instances: list[Model]) -> Any:
        first = instances[0]
        home = first._state.db
        if pools().by_alias.get(home or "") is None:
            return original(self, instances)
        first._state.db = router.db_for_read(type(first), instance=first)
        try:
            return original(self, instances)
        finally:
            first._state.db = home

    return fetch_many
