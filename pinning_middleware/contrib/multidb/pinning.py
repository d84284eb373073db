"""What was a flag of the thread, as pins of the scope and blocks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from asgiref.sync import iscoroutinefunction
from django.db import DEFAULT_DB_ALIAS

from pinning_middleware.api import is_pinned, pin_this_request, unpin_this_request
from pinning_middleware.decorators import Block
from pinning_middleware.scopes.overrides import Kind, open_blocks, override
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
    """Return whether a pin, or the innermost block, sends this scope's reads to the primary."""
    block = override(open_blocks(), DEFAULT_DB_ALIAS)
    if block is not None:
        return block.kind is Kind.PRIMARY
    scope = entered_scope()
    return scope is not None and (scope.from_primary or is_pinned())


def pin_this_thread() -> None:
    """
    Read from the primary for the rest of this scope, which no later one inherits; outside any,
    until ``unpin_this_thread()``.
    """
    scope = current_scope()
    scope.read_primary()
    scope.forget_answers()


def unpin_this_thread() -> None:
    """Do what ``unpin_this_request()`` does: blocks that are open still count."""
    unpin_this_request()


class UsePrimaryDB(Block):
    """``use_primary()`` as one object, which may be entered again and by many at once."""

    def __init__(self) -> None:
        super().__init__(Kind.PRIMARY)


class DeprecatedUseMaster(UsePrimaryDB):
    def __enter__(self) -> None:
        warnings.warn("use_master is use_primary_db now.", DeprecationWarning, stacklevel=2)
        super().__enter__()


use_primary_db = UsePrimaryDB()
use_master = DeprecatedUseMaster()


def mark_as_write(response: T) -> T:
    """Pin what follows this request; outside any, whoever is handed this response may."""
    response._db_write = True  # type: ignore[attr-defined]
    scope = entered_scope()
    if scope is not None and not scope.is_lasting:
        pin_this_request()
    return response


def db_write(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a view read from the primary, and pin what follows it. Writes do so by themselves."""
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
