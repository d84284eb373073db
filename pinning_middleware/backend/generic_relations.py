"""
Writes through the manager of a ``GenericRelation``.

Its querysets keep the alias that the read route gave (https://code.djangoproject.com/ticket/36389,
Django 5.2 to 6.1), so ``post.comments.update()`` would write to a replica. With this change they
call the router when they run, as the managers of foreign keys do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["route_writes"]


def route_writes(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``create_generic_related_manager``."""

    def create_generic_related_manager(superclass: Any, rel: Any) -> Any:
        class GenericRelatedObjectManager(original(superclass, rel)):  # type: ignore[misc]
            def _apply_rel_filters(self, queryset: Any) -> Any:
                filtered = super()._apply_rel_filters(queryset)
                filtered._add_hints(instance=self.instance)
                filtered._db = self._db
                return filtered

        return GenericRelatedObjectManager

    return create_generic_related_manager
