"""
The transactions of ``ATOMIC_REQUESTS``: those that Django opens around a view by itself are no wish
of the code, from the view's beginning to its end and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from django.core.handlers.base import BaseHandler
from django.db import connections

from pinning_middleware.scopes.scope import entered_scope

__all__ = ["install"]


def install() -> None:
    """Let scopes know when a view runs in such a transaction. Again changes nothing."""
    make_view_atomic = BaseHandler.make_view_atomic
    if getattr(make_view_atomic, "_pinning", False):
        return

    @functools.wraps(make_view_atomic)
    def make(self: BaseHandler, view: Callable[..., Any]) -> Callable[..., Any]:
        atomic = make_view_atomic(self, view)
        return atomic if atomic is view else _marked(view, atomic)

    make._pinning = True  # type: ignore[attr-defined]
    BaseHandler.make_view_atomic = make  # type: ignore[method-assign]


def _marked(view: Callable[..., Any], atomic: Callable[..., Any]) -> Callable[..., Any]:
    without = getattr(view, "_non_atomic_requests", ())

    @functools.wraps(view)
    def marked(*args: Any, **kwargs: Any) -> Any:
        scope = entered_scope()
        if scope is None:
            return atomic(*args, **kwargs)
        before = scope.view_transactions
        # Of this thread's connections: what another thread opens is a wish of the code.
        scope.view_transactions = {
            alias: connections[alias]
            for alias, settings in connections.settings.items()
            if settings["ATOMIC_REQUESTS"] and alias not in without
        }
        scope.forget_answers()
        try:
            return atomic(*args, **kwargs)
        finally:
            scope.view_transactions = before

    return marked
