"""How scopes outside requests begin and end: blocks, threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

from asgiref.sync import iscoroutinefunction, sync_to_async

from pinning_middleware import tokens
from pinning_middleware.pins import Pins
from pinning_middleware.routing.outgoing import akeep_keys, has_changed, keep_keys, outgoing_pins
from pinning_middleware.scopes.overrides import Open, enter_blocks, open_blocks
from pinning_middleware.scopes.scope import Scope, current_scope, enter, entered_scope

__all__ = ["PinningScope", "pinning_scope", "propagate_scope"]

P = ParamSpec("P")
R = TypeVar("R")


class _Entry(NamedTuple):
    """Who was entered, what was there before, and the scope that is told what this one did."""

    owner: PinningScope
    scope: Scope | None
    blocks: Open | None
    outer: Scope | None
    below: _Entry | None


_entries: ContextVar[_Entry | None] = ContextVar("pinning_entries", default=None)


class PinningScope:
    """
    A scope outside a request, as a block; it begins with the pins of a token.

    A token that this site did not sign is ignored, as a cookie would be. One object may be
    entered again, and by many threads at once: it is one scope.
    """

    def __init__(
        self, token: str | None = None, isolated: bool = False, scope: Scope | None = None
    ) -> None:
        self._scope = Scope.of(tokens.accept(token) if token else {}) if scope is None else scope
        self._is_isolated = isolated

    @property
    def token(self) -> str | None:
        """
        The token of what this scope leaves behind, ``None`` where that is nothing. May be asked
        inside the block and after it; it may ask the primary for its position.
        """
        pins = outgoing_pins(self._scope)
        return tokens.dumps(pins) if pins else None

    async def atoken(self) -> str | None:
        """Return ``token``, in async code."""
        return await sync_to_async(lambda: self.token)()

    @property
    def pins(self) -> Pins:
        """The pins of ``token``."""
        return outgoing_pins(self._scope)

    def __enter__(self) -> PinningScope:
        before, blocks = entered_scope(), open_blocks()
        outer = None
        if self._is_isolated:
            enter_blocks(None)
        elif before is not None and not before.is_inside(self._scope):
            outer = before
            self._scope.begin_in(outer)
        _entries.set(_Entry(self, before, blocks, outer, _entries.get()))
        enter(self._scope)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._scope.pinned_keys:
                keep_keys(self._scope)
        finally:
            self._leave()

    async def __aenter__(self) -> PinningScope:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._scope.pinned_keys:
                await akeep_keys(self._scope)
        finally:
            self._leave()

    def _leave(self) -> None:
        """
        Leave this scope, and no other; nothing where the context has moved on, as for a generator
        that is collected in another request.
        """
        above: list[_Entry] = []
        entry = _entries.get()
        while entry is not None and entry.owner is not self:
            above.append(entry)
            entry = entry.below
        if entry is None:
            self._scope.tell(self._scope.outer)
            return
        self._scope.tell(entry.outer)
        below = entry.below
        for other in reversed(above):
            # Whoever was entered from here is to go back to where this one came from.
            if other.scope is self._scope:
                outer = entry.outer if other.outer is self._scope else other.outer
                other = other._replace(scope=entry.scope, outer=outer)
            below = other._replace(below=below)
        _entries.set(below)
        if entered_scope() is not self._scope:
            return
        enter(entry.scope)
        if self._is_isolated:
            enter_blocks(entry.blocks)
        elif entry.scope is None and has_changed(self._scope):
            # A shell, say, is to know what it did in here.
            self._scope.tell(current_scope())


def pinning_scope(token: str | None = None, isolated: bool = False) -> PinningScope:
    """
    Return a scope for work outside a request, to be used as a ``with`` block::

        with pinning_scope(token) as scope:
            ...
        send_on(scope.token)

    ``token`` is what an earlier scope left behind. An unreadable one is ignored and counted.

    A scope that is opened inside another begins with what that one knows and tells it what it
    did; an ``isolated`` one does neither, as a worker needs that serves strangers by turns.
    """
    return PinningScope(token, isolated)


def propagate_scope(function: Callable[P, R]) -> Callable[P, R]:
    """
    Return the function, or coroutine function, bound to the scope and the blocks that are open
    now, to be run by another thread or task::

        executor.submit(propagate_scope(work), argument)

    What it writes pins this scope, as long as that lasts, and it reads what this scope may read.
    """
    carried = current_scope(), open_blocks()

    if iscoroutinefunction(function):

        @functools.wraps(function)
        async def abound(*args: P.args, **kwargs: P.kwargs) -> Any:
            before = _enter(*carried)
            try:
                return await function(*args, **kwargs)
            finally:
                _enter(*before)

        return cast("Callable[P, R]", abound)

    @functools.wraps(function)
    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        before = _enter(*carried)
        try:
            return function(*args, **kwargs)
        finally:
            _enter(*before)

    return bound


def _enter(scope: Scope | None, blocks: Open | None) -> tuple[Scope | None, Open | None]:
    before = entered_scope(), open_blocks()
    enter(scope)
    enter_blocks(blocks)
    return before
