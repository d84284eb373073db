"""What a scope begins with and what it leaves behind."""

from __future__ import annotations

import time
from types import TracebackType

from asgiref.sync import sync_to_async

from . import tokens
from .pins import Pin, Pins, live, merge_pins
from .pools import Pool, pools
from .state import Scope, enter, entered_scope

__all__ = ["PinningScope", "asks_database", "has_changed", "left_behind", "marks", "pinning_scope"]


def has_changed(scope: Scope) -> bool:
    """Return whether what follows this scope has to know of something that it did."""
    return any(state.pinned or state.dropped or state.served for state in scope.states.values())


def asks_database(scope: Scope) -> bool:
    """Return whether ``left_behind`` will ask a primary for its position."""
    return any(
        pool.tells_positions and (pool.state(scope).pinned or pool.state(scope).served)
        for pool in _touched(scope)
    )


def left_behind(scope: Scope) -> dict[str, Pin]:
    """
    Return the pins that what follows this scope has to honour, by their primaries' aliases.

    Call it when the scope's transactions are over. It may ask each primary that the scope wrote
    to for its position.
    """
    now = time.time()
    pins = dict(live(scope.carried or {}, now))
    for pool in _touched(scope):
        if pool.state(scope).dropped:
            pins.pop(pool.primary, None)
    for pool in _touched(scope):
        state = pool.state(scope)
        new = pool.new_pin(state, now) if state.pinned else pool.seen(state, now)
        if new is not None:
            pins = merge_pins(pins, {pool.primary: new})
    return pins


def marks(scope: Scope) -> list[tuple[float, float]]:
    """Return a value that differs when the scope has written or was pinned in between."""
    return [(state.written, state.by_hand) for state in scope.states.values()]


def _touched(scope: Scope) -> list[Pool]:
    return [pool for pool in pools().all if pool.key in scope.states]


class PinningScope:
    """
    A scope outside a request, as a block; it begins with the pins of a token.

    A token that this site did not sign is ignored, as a cookie would be.
    """

    def __init__(self, token: str | None = None) -> None:
        self._scope = Scope(tokens.accept(token) if token else None)
        self._outer: list[Scope | None] = []

    @property
    def token(self) -> str | None:
        """
        The token of what this scope leaves behind, ``None`` where that is nothing. May be asked
        inside the block and after it; it may ask the primary for its position.
        """
        pins = left_behind(self._scope)
        return tokens.dumps(pins) if pins else None

    async def atoken(self) -> str | None:
        """Return ``token``, in async code."""
        return await sync_to_async(lambda: self.token)()

    @property
    def pins(self) -> Pins:
        """The pins of ``token``."""
        return left_behind(self._scope)

    def __enter__(self) -> PinningScope:
        self._outer.append(entered_scope())
        enter(self._scope)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        outer = self._outer.pop()
        enter(outer)
        if outer is not None and not outer.lasting:
            # Whoever started this block, a request that runs a task in place say, is to see
            # what it wrote.
            for key, state in self._scope.states.items():
                if state.pinned:
                    outer.state(key, state.primary).take_over(state)


def pinning_scope(token: str | None = None) -> PinningScope:
    """
    Return a scope for work outside a request, to be used as a ``with`` block::

        with pinning_scope(token) as scope:
            ...
        send_on(scope.token)

    ``token`` is what an earlier scope left behind. An unreadable one is ignored and counted.
    """
    return PinningScope(token)
