"""What a scope begins with and what it leaves behind."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

from asgiref.sync import sync_to_async

from . import keyed, tokens
from .conf import conf
from .pins import Pin, Pins, live
from .pools import Pool, pools
from .state import (
    PoolState,
    Scope,
    current_scope,
    enter,
    entered_scope,
    writes_ignored,
)

__all__ = [
    "PinningScope",
    "akeep_keys",
    "asks_database",
    "carry_scope",
    "count_changes",
    "has_changed",
    "keep_keys",
    "left_behind",
    "pinning_scope",
]

P = ParamSpec("P")
R = TypeVar("R")


def has_changed(scope: Scope) -> bool:
    """Return whether what follows this scope has to know of something that it did."""
    # A loop, since every request comes by here and a generator takes twice as long.
    for state in scope.values():
        if state.changes:
            return True
    return bool(scope.pinned_keys)


def asks_database(scope: Scope) -> bool:
    """Return whether ``left_behind`` will ask a primary for its position."""
    return bool(scope.pinned_keys) or any(
        pool.tells_positions and (state.pinned or state.served) for pool, state in _touched(scope)
    )


def left_behind(scope: Scope) -> dict[str, Pin]:
    """
    Return the pins that what follows this scope has to honour, by their primaries' aliases.

    Call it when the scope's transactions are over. It may ask each primary that the scope wrote
    to for its position.
    """
    now = time.time()
    scope = scope.whole
    touched = _touched(scope)
    pins = live(scope.carried, now) if scope.carried else {}
    for pool, state in touched:
        if state.dropped:
            pins.pop(pool.primary, None)
    for pool, state in touched:
        new = pool.new_pin(state, now) if state.pinned else pool.seen(state, now)
        if new is not None:
            known = pins.get(pool.primary)
            pins[pool.primary] = new if known is None else known.merge(new)
    return pins


def pins_of_keys(scope: Scope, pins: Pins) -> dict[str | None, dict[str, Pin]]:
    """
    Return what the scope's keys are to be pinned by, for each ``using`` that they were given
    with: what the scope leaves behind, else what the primary has by now.
    """
    until = time.time() + conf.seconds
    return {
        using: {
            pool.primary: pins[pool.primary] if pool.primary in pins else pool.pin_now(until)
            for pool in pools().of_primary(using)
        }
        for using in dict.fromkeys(scope.pinned_keys.values())
    }


def keep_keys(scope: Scope) -> None:
    """Pin the scope's keys. Call it when its transactions are over."""
    for using, pins in pins_of_keys(scope, left_behind(scope)).items():
        keyed.keep(_keys_of(scope, using), pins)


async def akeep_keys(scope: Scope) -> None:
    """Pin the scope's keys, in async code."""
    pins_by_using = await sync_to_async(lambda: pins_of_keys(scope, left_behind(scope)))()
    for using, pins in pins_by_using.items():
        await keyed.akeep(_keys_of(scope, using), pins)


def _keys_of(scope: Scope, using: str | None) -> list[str]:
    return [key for key, of in scope.pinned_keys.items() if of == using]


def count_changes(scope: Scope) -> int:
    """Return a number that is larger when the scope has written or was pinned in between."""
    return sum(state.changes for state in scope.values())


def _touched(scope: Scope) -> list[tuple[Pool, PoolState]]:
    return [(pool, scope[pool.key]) for pool in pools().all if pool.key in scope]


class PinningScope:
    """
    A scope outside a request, as a block; it begins with the pins of a token.

    A token that this site did not sign is ignored, as a cookie would be.
    """

    def __init__(self, token: str | None = None, scope: Scope | None = None) -> None:
        self._scope = Scope(tokens.accept(token) if token else {}) if scope is None else scope

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
        outer = entered_scope()
        # A view for each entry, so that several threads may be inside at once.
        enter(self._scope.inside(outer.override if outer is not None else None, outer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._scope.pinned_keys:
            keep_keys(self._scope)
        self._leave()

    async def __aenter__(self) -> PinningScope:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._scope.pinned_keys:
            await akeep_keys(self._scope)
        self._leave()

    def _leave(self) -> None:
        view = entered_scope()
        outer = view.outer if view is not None else None
        enter(outer)
        if outer is not None and not outer.lasting:
            # Whoever started this block, a request that runs a task in place say, is to see
            # what it wrote.
            for key, state in self._scope.items():
                if state.pinned:
                    outer[key].take_over(state)


def pinning_scope(token: str | None = None) -> PinningScope:
    """
    Return a scope for work outside a request, to be used as a ``with`` block::

        with pinning_scope(token) as scope:
            ...
        send_on(scope.token)

    ``token`` is what an earlier scope left behind. An unreadable one is ignored and counted.
    """
    return PinningScope(token)


def carry_scope(function: Callable[P, R]) -> Callable[P, R]:
    """
    Return the function bound to the scope that is open now, to be run by another thread::

        executor.submit(carry_scope(work), argument)

    What it writes pins this scope, as long as that lasts, and it reads what this scope may read.
    """
    scope, ignored = current_scope(), writes_ignored.get()

    @functools.wraps(function)
    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        before, ignored_before = entered_scope(), writes_ignored.get()
        enter(scope)
        writes_ignored.set(ignored)
        try:
            return function(*args, **kwargs)
        finally:
            enter(before)
            writes_ignored.set(ignored_before)

    return bound
