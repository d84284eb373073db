"""Replacements for methods of Django's ORM."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.route import forget_decision


class _Property(property):
    """A property that, unlike Django's, can have further attributes."""


def named_alias(original: property) -> property:
    """
    Make a queryset with ``using()`` follow no decision that was made for another read.

    Django asks the router for ``queryset.db`` even if no read follows, and opens the cursor later.
    """

    def db(self: Any) -> str:
        if self._db is not None:
            forget_decision()
        return original.__get__(self)  # type: ignore[no-any-return]

    return _Property(db)


def accept_pool_aliases(original: Callable[..., Any]) -> Callable[..., Any]:
    """
    Let ``filter(pk__in=Other.objects.using("default"))`` run on a replica.

    Django compares the alias of the subquery with that of the connection, and raises "Subqueries
    aren't allowed across different databases" for two aliases of one pool.
    """

    def process_rhs(self: Any, compiler: Any, connection: Any) -> Any:
        alias = getattr(self.rhs, "_db", None)
        if alias is not None and alias != connection.alias:
            known = pools().by_alias
            pool = known.get(alias)
            if pool is not None and pool is known.get(connection.alias):
                self = copy.copy(self)
                self.rhs = self.rhs.clone()
                self.rhs._db = None
        return original(self, compiler, connection)

    return process_rhs


def route_writes(original: Callable[..., Any]) -> Callable[..., Any]:
    """
    Let the querysets of the manager of a ``GenericRelation`` call the router when they run.

    Django's keep the alias that the read route gave, so that ``post.comments.update()`` would write
    to a replica. https://code.djangoproject.com/ticket/36389
    """

    def create_generic_related_manager(superclass: Any, rel: Any) -> Any:
        class GenericRelatedObjectManager(original(superclass, rel)):  # type: ignore[misc]
            def _apply_rel_filters(self, queryset: Any) -> Any:
                filtered = super()._apply_rel_filters(queryset)
                filtered._add_hints(instance=self.instance)
                filtered._db = self._db
                return filtered

        return GenericRelatedObjectManager

    return create_generic_related_manager
