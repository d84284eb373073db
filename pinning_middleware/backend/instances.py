"""
Instances belong to their pool: what is read from a replica has the primary's alias in
``_state.db``.

So ``only(…).get()`` and ``save()`` write the fields that are there and not stale values of the
others, an instance from a replica may be added to a relation of one from the primary, and what is
pickled outlives a change of replicas.
"""

from __future__ import annotations

import functools
from typing import Any

from django.apps import apps
from django.db.models import Model
from django.db.models.signals import class_prepared

from pinning_middleware.conf import conf, on_change

__all__ = ["install"]


class _Homes(dict[str, str]):
    """The alias of an instance by the alias that it was read from."""

    def __missing__(self, alias: str) -> str:
        home = self[alias] = conf.guarded.get(alias, alias)
        return home


homes = _Homes()
on_change(homes.clear)


def install() -> None:
    """Give instances their pool's alias from now on. Calling it again changes nothing."""
    _adopt(Model)
    class_prepared.connect(_on_class, dispatch_uid="pinning_middleware.instances")
    for model in apps.get_models(include_auto_created=True):
        _on_class(model)


def _on_class(sender: type[Any], **kwargs: Any) -> None:
    # A model may make its instances itself, or have that from a base.
    for base in sender.__mro__:
        if "from_db" in base.__dict__:
            _adopt(base)


def _adopt(owner: type[Any]) -> None:
    own = owner.__dict__["from_db"]
    original = getattr(own, "__func__", None)
    if original is None or getattr(original, "_pinning", False):
        return

    # Called for every row, so that nothing but a look-up may be in the way.
    @functools.wraps(original)
    def from_db(cls: type[Model], db: str, *args: Any, **kwargs: Any) -> Model:
        instance: Model = original(cls, homes[db], *args, **kwargs)
        return instance

    from_db._pinning = True  # type: ignore[attr-defined]
    owner.from_db = classmethod(from_db)
