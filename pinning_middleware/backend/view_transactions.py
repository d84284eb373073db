"""
The transactions of ``ATOMIC_REQUESTS``.

Django opens them around a view, so they do not show that the code needs the primary. They count for
the connections of the view's own thread, from the beginning of the view to its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from django.db import connections

from pinning_middleware.scopes.scope import entered_scope


def mark_view_transactions(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``BaseHandler.make_view_atomic``."""

    def make_view_atomic(self: Any, view: Callable[..., Any]) -> Callable[..., Any]:
        atomic = original(self, view)
        callback = atomic if atomic is view else _marked(view, atomic)
        scope = entered_scope()
        return callback if scope is None or scope.wrap_view is None else scope.wrap_view(callback)

    return make_view_atomic


def _marked(view: Callable[..., Any], atomic: Callable[..., Any]) -> Callable[..., Any]:
    excluded = getattr(view, "_non_atomic_requests", ())

    @functools.wraps(view)
    def marked(*args: Any, **kwargs: Any) -> Any:
        scope = entered_scope()
        if scope is None:
            return atomic(*args, **kwargs)
        previous = scope.view_transactions
        scope.view_transactions = {
            alias: connections[alias]
            for alias, settings in connections.settings.items()
            if settings["ATOMIC_REQUESTS"] and alias not in excluded
        }
        try:
            return atomic(*args, **kwargs)
        finally:
            scope.view_transactions = previous

    return marked
