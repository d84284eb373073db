"""The thread-local pinning functions of django-multidb-router, for scopes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from asgiref.sync import iscoroutinefunction
from django.db import DEFAULT_DB_ALIAS

from pinning_middleware.api import is_pinned, pin_this_request, unpin_this_request
from pinning_middleware.decorators import Block
from pinning_middleware.scopes.overrides import OverrideKind, effects_on
from pinning_middleware.scopes.scope import current_scope, entered_scope

__all__ = [
    "db_write",
    "mark_as_write",
    "pin_this_thread",
    "this_thread_is_pinned",
    "unpin_this_thread",
    "use_master",
    "use_primary_db",
]

T = TypeVar("T")


def this_thread_is_pinned() -> bool:
    """Return whether reads go to the primary, by a pin or the innermost context manager."""
    override = effects_on(DEFAULT_DB_ALIAS).routing
    if override is not None:
        return override.kind is not OverrideKind.REPLICA
    scope = entered_scope()
    return scope is not None and (scope.prefers_primary or is_pinned())


def pin_this_thread() -> None:
    """
    Read from the primary for the rest of this scope; later scopes do not inherit this.

    Outside a scope, read from the primary until ``unpin_this_thread()``.
    """
    current_scope().prefers_primary = True


def unpin_this_thread() -> None:
    """Call ``unpin_this_request()``. Open context managers stay in effect."""
    unpin_this_request()


class UsePrimaryDB(Block):
    """``use_primary()`` as a single object that is reusable and reentrant."""

    def __init__(self) -> None:
        super().__init__(OverrideKind.PRIMARY)


class DeprecatedUseMaster(UsePrimaryDB):
    def __enter__(self) -> None:
        warnings.warn("Use use_primary_db instead of use_master.", DeprecationWarning, stacklevel=2)
        super().__enter__()


use_primary_db = UsePrimaryDB()
use_master = DeprecatedUseMaster()


def mark_as_write(response: T) -> T:
    """Mark a response as following a write, and pin the client of this request."""
    response._db_write = True  # type: ignore[attr-defined]
    scope = entered_scope()
    if scope is not None and not scope.is_ambient:
        pin_this_request()
    return response


def db_write(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a view read from the primary and pin its client. Writes do this anyway."""
    inside = use_primary_db(function)

    if iscoroutinefunction(function):

        @functools.wraps(function)
        async def amarked(*args: Any, **kwargs: Any) -> Any:
            return mark_as_write(await inside(*args, **kwargs))

        return amarked

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        return mark_as_write(inside(*args, **kwargs))

    return marked
