"""
Writes through a ``GenericRelation``'s manager.

Its querysets keep the alias that the read route gave (https://code.djangoproject.com/ticket/36389,
Django 5.2 to 6.1), so ``post.comments.update()`` would write to a replica. Here they ask the
route that fits when they run, as the managers of foreign keys do.
"""

from __future__ import annotations

from typing import Any

from django.apps import apps

__all__ = ["install"]


def install() -> None:
    """Let generic relations ask the write route for writes. Calling it again changes nothing."""
    if not apps.is_installed("django.contrib.contenttypes"):
        return
    from django.contrib.contenttypes import fields

    factory = fields.create_generic_related_manager
    if getattr(factory, "_pinning", False):
        return

    def create_generic_related_manager(superclass: Any, rel: Any) -> Any:
        class GenericRelatedObjectManager(factory(superclass, rel)):  # type: ignore[misc]
            def _apply_rel_filters(self, queryset: Any) -> Any:
                filtered = super()._apply_rel_filters(queryset)
                filtered._add_hints(instance=self.instance)
                filtered._db = self._db
                return filtered

        return GenericRelatedObjectManager

    create_generic_related_manager._pinning = True  # type: ignore[attr-defined]
    fields.create_generic_related_manager = create_generic_related_manager
