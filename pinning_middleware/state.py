"""
The state of a scope: plain flags, no I/O, no settings.

A scope lives in a context variable that holds one mutable object. A child task and a thread of
``sync_to_async`` copy the context and so share the object: what a child writes, its parent knows.
Another request has another object.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

from .pins import Pin, Pins, merge_pins

__all__ = [
    "Override",
    "PoolState",
    "Scope",
    "current_scope",
    "enter",
    "entered_scope",
    "writes_ignored",
]


_NONE: Pins = MappingProxyType({})


class PoolState:
    """What one scope knows of one pool."""

    # Whether the answer came by turns, with no pin in the way.
    by_turn = False
    # The pin of an earlier scope was ended, so the stores have to forget it.
    dropped = False
    # The nodes it read from, kept only where a read moves the client's position.
    served: set[str] | None = None
    # Whether a transaction may still have been open at the last write.
    open_write = False
    # For how long it was pinned by hand, None: the window.
    seconds: float | None = None
    # When replicas were asked in vain for the carried pin (monotonic clock, 0.0: never).
    looked = 0.0
    # The pin that was told to others last, and how many changes it knows of.
    left: tuple[int, Pin] | None = None

    def __init__(self, key: str) -> None:
        self.key = key
        # The alias that serves until something changes, so that most reads decide nothing.
        self.answer: str | None = None
        # This scope's replica by turns.
        self.replica: str | None = None
        # On the primary for the rest of the scope, without a pin.
        self.held = False
        # When it wrote last, and when it was pinned by hand; 0.0: never.
        self.written = self.by_hand = 0.0
        # The pin of an earlier scope.
        self.carried: Pin | None = None
        # How often it did what follows this scope may have to know of.
        self.changes = 0

    @property
    def primary(self) -> str:
        """The primary's alias, with which the key of every pool begins."""
        return self.key.partition("\0")[0]

    def note_write(self, in_transaction: bool) -> None:
        self.changes += 1
        self.written = time.time()
        self.open_write = in_transaction
        self.answer = None

    def note_lock(self) -> None:
        self.held = True
        self.answer = None

    def pin(self, seconds: float | None) -> None:
        self.changes += 1
        self.by_hand = time.time()
        if seconds is not None:
            self.seconds = max(seconds, self.seconds or 0.0)
        self.answer = None

    def take_over(self, other: PoolState) -> None:
        """Let this scope have done what another one inside it did."""
        self.changes += other.changes
        self.written = max(self.written, other.written)
        self.open_write = self.open_write or other.open_write
        self.by_hand = max(self.by_hand, other.by_hand)
        if other.seconds is not None:
            self.seconds = max(other.seconds, self.seconds or 0.0)
        self.answer = None

    def settle(self) -> None:
        """Forget what this scope did itself: it has become a pin, or is over."""
        self.open_write = False
        self.written = self.by_hand = 0.0
        self.seconds = self.answer = None

    def unpin(self) -> None:
        self.held = False
        self.settle()
        self.drop()

    def leave(self, replica: str) -> None:
        """Choose another replica for the rest of the scope."""
        if self.replica == replica:
            self.replica = None
        if self.answer == replica:
            self.answer = None

    def drop(self) -> None:
        """Forget the pin of an earlier scope."""
        if self.carried is not None:
            self.changes += 1
            self.dropped = True
        self.carried = None

    @property
    def pinned(self) -> bool:
        """Whether this scope pinned the pool, by a write or by hand."""
        return bool(self.written or self.by_hand)

    def pin_ends(self, window: float, now: float) -> tuple[float, float]:
        """
        Return the end of the pin this scope leaves behind, and until when a position does not
        count for it, both in seconds since the epoch.
        """
        written = now if self.open_write else self.written
        until = written + window if written else 0.0
        if not self.by_hand:
            return until, 0.0
        held = self.by_hand + self.seconds if self.seconds is not None else 0.0
        return max(until, held or self.by_hand + window), held


class Scope(dict[str, PoolState]):
    """
    One unit of work: what it knows of each pool, by the pool's key, made at the first use.

    ``lasting`` scopes have no end of their own (a shell, a thread that nobody gave a scope), so
    that the window ends what a write began.

    Inside a block (``use_primary`` and its like) the scope is seen through a view, which shares
    all that the scope knows and adds the block: two tasks of one scope do not enter each other's
    blocks, and a decision looks at one context variable only.
    """

    # What every scope sets or every decision reads has a slot; the rest are defaults of the class.
    __slots__ = ("__dict__", "carried", "lasting", "override", "primary_first")

    # The primaries on which ATOMIC_REQUESTS opens a transaction around the view.
    atomic_view: tuple[str, ...] = ()
    # Keys of a cache that are to be pinned when it ends, and of which primaries.
    pinned_keys: Mapping[str, str | None] = MappingProxyType({})
    # Seconds to wait for a replica to catch up, None: as the settings say.
    wait: float | None = None
    # Of a view: the scope that it shows, and what is entered again when its block ends.
    shown: Scope | None = None
    outer: Scope | None = None

    def __init__(
        self, carried: Pins = _NONE, primary_first: bool = False, lasting: bool = False
    ) -> None:
        # The pins that it came with.
        self.carried = carried
        # Whether its method is one that reads from the primary.
        self.primary_first = primary_first
        self.lasting = lasting
        # The innermost open block, of a view.
        self.override: Override | None = None

    def __bool__(self) -> bool:
        # One that knows of no pool yet is a scope all the same.
        return True

    def __missing__(self, key: str) -> PoolState:
        if self.shown is not None:
            state = self.shown[key]
        else:
            state = PoolState(key)
            if self.primary_first:
                state.held = True
            if self.carried:
                state.carried = self.carried.get(state.primary)
        # Another thread of this scope may have been faster.
        return self.setdefault(key, state)

    @property
    def whole(self) -> Scope:
        """The scope itself, where this is a view of it."""
        return self if self.shown is None else self.shown

    def inside(self, override: Override | None, outer: Scope | None) -> Scope:
        """Return a view of this scope inside a block, after which ``outer`` is entered again."""
        view = Scope(self.carried, self.primary_first, self.lasting)
        view.atomic_view, view.wait = self.atomic_view, self.wait
        view.shown, view.override, view.outer = self.whole, override, outer
        return view

    def within(self, outer: Scope | None) -> Scope:
        """Return this scope inside the blocks that are open around it."""
        if outer is None or outer.override is None:
            return self
        return self.inside(outer.override, None)

    def carry(self, pins: Pins) -> None:
        """Take on pins of earlier scopes, beside those that are already carried."""
        if not pins:
            return
        scope = self.whole
        scope.carried = merge_pins(scope.carried, pins)
        for state in scope.values():
            if state.primary in pins:
                state.carried = scope.carried[state.primary]
                state.answer = None


class Override(NamedTuple):
    """An open ``use_primary`` or ``use_replica`` block, and the one around it."""

    replica: bool
    using: str | None
    max_lag: float | None
    outer: Override | None

    def for_pool(self, primary: str) -> Override | None:
        """Return the innermost block that speaks of this pool."""
        block: Override | None = self
        while block is not None and block.using is not None and block.using != primary:
            block = block.outer
        return block


_scope: ContextVar[Scope | None] = ContextVar("pinning_scope", default=None)
writes_ignored: ContextVar[int] = ContextVar("pinning_writes_ignored", default=0)

entered_scope = _scope.get
# Enter a scope by `enter(scope)` and leave it by `enter(what was entered before)`: `reset(token)`
# raises where a scope is left in another context than it was entered in.
enter = _scope.set


def current_scope() -> Scope:
    """Return the scope of this unit of work; outside any, a lasting one of this context."""
    scope = _scope.get()
    if scope is None:
        scope = Scope(lasting=True)
        _scope.set(scope)
    return scope
