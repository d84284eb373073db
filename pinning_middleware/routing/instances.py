"""
Instances belong to their pool: what is read from a replica has the primary's alias in
``_state.db``.

So ``only(…).get()`` and ``save()`` write the fields that are there and not stale values of the
others, an instance from a replica may be added to a relation of one from the primary, and what is
pickled outlives a change of replicas.
"""

from __future__ import annotations

from typing import Any

from django.db.models import Model

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
    original = Model.from_db.__func__  # type: ignore[attr-defined]
    if getattr(original, "_pinning", False):
        return

    # Called for every row, so that nothing but a look-up may be in the way.
    def from_db(cls: type[Model], db: str, *args: Any, **kwargs: Any) -> Model:
        instance: Model = original(cls, homes[db], *args, **kwargs)
        return instance

    from_db._pinning = True  # type: ignore[attr-defined]
    from_db.__doc__ = original.__doc__
    Model.from_db = classmethod(from_db)  # type: ignore[assignment]
