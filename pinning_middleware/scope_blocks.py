"""Scopes outside requests: ``pinning_scope()``, and propagation to threads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar, cast

from asgiref.sync import iscoroutinefunction, sync_to_async

from pinning_middleware import tokens
from pinning_middleware.conf import conf
from pinning_middleware.decorators import agenerate_within, generate_within
from pinning_middleware.pins import Pins
from pinning_middleware.routing.outgoing import announce, outgoing_pins, save_keys
from pinning_middleware.scopes.overrides import Override, current_overrides, set_overrides
from pinning_middleware.scopes.scope import Scope, current_scope, enter, entered_scope
from pinning_middleware.scopes.threads import not_inherited
from pinning_middleware.scopes.watch import Watch, current_watch, set_watch

P = ParamSpec("P")
R = TypeVar("R")

# The innermost pinning_scope() of this context.
_innermost: ContextVar[PinningScope | None] = ContextVar("pinning_scope_block", default=None)
not_inherited(_innermost)


class PinningScope:
    """
    A scope outside a request, as a context manager; it begins with the pins of a token.

    A token that this site did not sign is ignored, like a cookie.
    """

    def __init__(
        self,
        token: str | None = None,
        isolated: bool = False,
        scope: Scope | None = None,
    ) -> None:
        self._scope = Scope(tokens.accept(token) if token else {}) if scope is None else scope
        self._is_isolated = isolated
        # If isolated, called with the scope for writes after the end of the block.
        self.on_late_change: Callable[[Scope], None] = _report
        self._outer: tuple[Scope | None, Override | None, PinningScope | None] | None = None

    @property
    def token(self) -> str | None:
        """
        The token of the outgoing pins, or None if there are none. It may be used inside
        the block and after it, and may query the primary's position.
        """
        pins = outgoing_pins(self._scope)
        return tokens.dumps(pins) if pins else None

    async def atoken(self) -> str | None:
        """Async version of ``token``."""
        return await sync_to_async(lambda: self.token)()

    @property
    def pins(self) -> Pins:
        """The pins of ``token``."""
        return outgoing_pins(self._scope)

    def __enter__(self) -> PinningScope:
        if self._outer is not None:
            raise RuntimeError(
                "This pinning_scope() was entered before. Call pinning_scope() again; pass it the "
                "token of the first one to continue its pins."
            )
        outer, overrides = entered_scope(), current_overrides()
        self._outer = outer, overrides, _innermost.get()
        if self._is_isolated:
            set_overrides(None)
        elif outer is not None:
            self._scope.attach_to(outer)
        _innermost.set(self)
        enter(self._scope)
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            if self._scope.keys:
                save_keys(self._scope)
        finally:
            self._restore()
            _report(self._scope)
            self._scope.close(conf.seconds, self.on_late_change)

    async def __aenter__(self) -> PinningScope:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            if self._scope.keys:
                await sync_to_async(save_keys)(self._scope)
        finally:
            self._restore()
            parent = self._scope.parent
            try:
                if parent is not None and parent.is_closed:
                    # It saves its pins now, which may do I/O.
                    await sync_to_async(_report)(self._scope)
                else:
                    _report(self._scope)
            finally:
                self._scope.close(conf.seconds, self.on_late_change)

    def _restore(self) -> None:
        """Enter what was entered before the block."""
        assert self._outer is not None
        scope, overrides, block = self._outer
        if self._is_entered():
            _innermost.set(block)
            enter(scope)
            if self._is_isolated:
                set_overrides(overrides)
            elif scope is None and self._scope.revision:
                # For example a shell, which must know the writes of the block.
                self._scope.parent = current_scope()

    def _is_entered(self) -> bool:
        """Return whether this context is inside the block; a suspended generator may not be."""
        block = _innermost.get()
        if block is None or block._scope is not entered_scope():
            return False
        while block is not None and block is not self:
            block = None if block._outer is None else block._outer[2]
        return block is self


def _report(scope: Scope) -> None:
    """Merge the state of a scope into the enclosing one; after its end, pin its keys again."""
    if scope.is_closed and scope.keys:
        save_keys(scope)
    if scope.parent is not None:
        scope.merge_into(scope.parent)
        announce(scope.parent)


def pinning_scope(token: str | None = None, isolated: bool = False) -> PinningScope:
    """
    Return a scope for work outside a request, to be used in a ``with`` statement, once::

        with pinning_scope(token) as scope:
            ...
        send_on(scope.token)

    ``token`` is that of an earlier scope. An unreadable one is ignored and counted.

    A scope inside another one begins with the outer state and merges its own
    writes back; an ``isolated`` one does neither, for workers that run unrelated tasks one
    after another.
    """
    return PinningScope(token, isolated)


def propagate_scope(function: Callable[P, R]) -> Callable[P, R]:
    """
    Return the function, coroutine function or generator function, bound to the scope and the
    overrides that are active now, to be run by another thread, greenlet or task::

        executor.submit(propagate_scope(work), argument)

    Its writes pin this scope, and its reads are routed like those of this scope.
    """
    state = current_scope(), current_overrides(), current_watch()
    if inspect.isgeneratorfunction(function):
        wrapper = generate_within(lambda: _Propagated(*state), function)
    elif inspect.isasyncgenfunction(function):
        wrapper = agenerate_within(lambda: _Propagated(*state), function)
    elif iscoroutinefunction(function):

        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
            with _Propagated(*state):
                return await function(*args, **kwargs)

    else:

        def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
            with _Propagated(*state):
                return function(*args, **kwargs)

    return cast("Callable[P, R]", functools.wraps(function)(wrapper))


class _Propagated(AbstractContextManager[None]):
    """Enters a scope and its overrides, and keeps what the code inside has entered since."""

    def __init__(self, *state: Any) -> None:
        self._state = state

    def __enter__(self) -> None:
        self._outer = _switch(*self._state)

    def __exit__(self, *exc_info: object) -> None:
        self._state = _switch(*self._outer)


def _switch(
    scope: Scope | None, overrides: Override | None, watch: Watch | None
) -> tuple[Scope | None, Override | None, Watch | None]:
    previous = entered_scope(), current_overrides(), current_watch()
    enter(scope)
    set_overrides(overrides)
    set_watch(watch)
    return previous
