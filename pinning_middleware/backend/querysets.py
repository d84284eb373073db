"""Querysets whose alias the code has named."""

from __future__ import annotations

from typing import Any

from pinning_middleware.routing.route import forget_decision

__all__ = ["named_alias"]


class _Property(property):
    """A property that, unlike Django's, can have further attributes."""


def named_alias(original: property) -> property:
    """
    Make a queryset with ``using()`` follow no decision that was made for another read.

    Django asks the router for ``queryset.db`` also if no read follows, and opens the cursor later.
    """

    def db(self: Any) -> str:
        if self._db is not None:
            forget_decision()
        return original.__get__(self)  # type: ignore[no-any-return]

    return _Property(db)
