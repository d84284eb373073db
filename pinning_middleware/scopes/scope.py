"""
What one scope did and came with, for each pool: facts, no I/O, no settings.

A scope lives in a context variable that holds one mutable object. A child task and a thread of
``sync_to_async`` copy the context and so share the object: what a child writes, its parent knows.
Another request has another object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, ClassVar

from pinning_middleware.pins import SEEN, Pin, Pins, Position, merge_pins, merge_positions
from pinning_middleware.reasons import Reason
from pinning_middleware.utils import clock

__all__ = ["Facts", "Scope", "Write", "current_scope", "enter", "entered_scope"]

_NONE: Pins = MappingProxyType({})


class Write:
    """A scope's latest write on one connection, and when it ended (seconds since the epoch)."""

    __slots__ = ("_block", "_connection", "_ended")

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        # The outermost transaction that it is part of, but a test's own: it ends with that.
        blocks = (block for block in connection.atomic_blocks if not block._from_testcase)
        self._block = next(blocks, None)
        self._ended = 0.0

    def end(self) -> None:
        """Note that the statement is over."""
        self._ended = clock.now()

    def ended(self, now: float) -> float:
        """Return when it ended, 0.0: it has not, or its transaction may still be open."""
        if not self._ended:
            return 0.0
        connection, block = self._connection, self._block
        if block is not None:
            if any(block is one for one in connection.atomic_blocks):
                return 0.0
            # ProbeResult only now, so not before now, as far as anybody may rely on it.
            self._block, self._ended = None, now
        elif not connection.autocommit and connection.connection is not None:
            return 0.0
        return self._ended


class Facts:
    """What one scope knows of one pool. Most scopes only read, so all else is a default here."""

    # The pins of earlier scopes: of what the client wrote, and of what it has seen.
    carried: Pin | None = None
    seen: Pin | None = None
    # The scope's own writes, the latest of each connection.
    writes: Mapping[int, Write] = MappingProxyType({})
    # Whether nothing speaks against a replica, so that a decision need not look at what follows.
    is_plain = True
    # The replica that the scope reads from, and since when (monotonic clock).
    replica: str | None = None
    turned = 0.0
    # The alias that serves until something changes, so that most reads decide nothing; and why.
    answer: str | None = None
    reason: str = Reason.ROUND_ROBIN
    # What was decided inside this innermost block, while nothing speaks against a replica.
    in_block: tuple[Any, tuple[str, str]] | None = None
    # The last decision that was not kept, until its read has run: an alias and a reason.
    decided: tuple[str, str] | None = None
    # The replica that a test mirror was chosen as, where the primary answers for it.
    meant: str | None = None
    # Where its reads went and why, as often as that changed, for those who are to be told.
    routes: tuple[tuple[str, str], ...] = ()
    # The fallback that was said last.
    said = ""
    # When replicas were asked in vain for the carried pin (monotonic clock, 0.0: never).
    looked = 0.0
    # When it was pinned by hand, 0.0: never; until when for as long as was said.
    by_hand = held = 0.0
    # A locking read holds the rest of the scope on the primary, without a pin.
    is_locked = False
    # The pin that it came with was ended by hand: stores forget that very pin.
    is_unpinned = False
    # What the request's method says does not count for this pool any more.
    is_lifted = False
    # How often it did what follows this scope may have to know of.
    changes = 0
    # What it left behind last, and how many changes that knows of.
    left: tuple[int, Pin] | None = None
    # The aliases that it read from, kept only where a read moves the client's position.
    served: list[str] | None = None

    # A replica that was waited for (``None``: in vain) and for how many seconds, to be said.
    waited: tuple[str | None, float] | None = None

    def __init__(self, key: str) -> None:
        self.key = key

    @property
    def primary(self) -> str:
        """The primary's alias, with which the key of every pool begins."""
        return self.key.partition("\0")[0]

    @property
    def is_pinned(self) -> bool:
        """Whether this scope pinned the pool, by a write or by hand."""
        return bool(self.writes or self.by_hand or self.held)

    def note_write(self, connection: Any) -> Write:
        """Note that a write begins; ``end()`` of what is returned says that it is over."""
        write = self._own_writes()[id(connection)] = Write(connection)
        self.changes += 1
        self._has_news()
        return write

    def _own_writes(self) -> dict[int, Write]:
        # Atomically, since several threads of a scope may begin to write at once.
        writes: dict[int, Write] = self.__dict__.setdefault("writes", {})
        return writes

    def note_lock(self) -> None:
        self.is_locked = True
        self._has_news()

    def _has_news(self) -> None:
        self.is_plain, self.answer = False, None

    def pin(self, seconds: float | None) -> None:
        """
        Pin by hand, for so many seconds that no position ends, or for the window. For none at all
        it is the rest of the scope, without a pin.
        """
        now = clock.now()
        if seconds is None:
            self.by_hand = now
        elif seconds:
            self.held = max(self.held, now + seconds)
        else:
            self.is_locked = True
        self.changes += 1
        self._has_news()

    def unpin(self) -> None:
        if self.is_pinned or self.carried is not None or self.seen is not None:
            self.changes += 1
            self.is_unpinned = True
        self.carried = self.seen = self.left = None
        self.is_locked = False
        self.settle()

    def settle(self, over: Mapping[int, Write] | None = None) -> None:
        """Forget what this scope did itself, of its writes these, or all: it is over."""
        for number, write in (dict(self.writes) if over is None else over).items():
            # Another thread may have begun to write meanwhile.
            if self.writes.get(number) is write:
                self._own_writes().pop(number, None)
        self.by_hand = self.held = 0.0
        self.answer = None

    def begin_in(self, outer: Facts) -> None:
        """Know what a scope knows that is open around this one."""
        if outer.writes:
            self._own_writes().update(outer.writes)
        self.by_hand = max(self.by_hand, outer.by_hand)
        self.held = max(self.held, outer.held)
        self.is_locked = self.is_locked or outer.is_locked
        self.is_plain, self.answer = self.is_plain and outer.is_plain, None
        self.carry(outer.carried, outer.seen)

    def take_over(self, other: Facts) -> None:
        """Let this scope have done what one inside it did."""
        if other.writes:
            self._own_writes().update(other.writes)
        self.by_hand = max(self.by_hand, other.by_hand)
        self.held = max(self.held, other.held)
        self.changes += other.changes
        if other.carried is not None:
            self.carry(other.carried, other.seen)
        self._has_news()

    def carry(self, pin: Pin | None, seen: Pin | None) -> None:
        """Take on pins of earlier scopes, beside those that are already carried."""
        if pin is not None:
            self.carried = pin if self.carried is None else self.carried.merge(pin)
        if seen is not None:
            self.seen = seen if self.seen is None else self.seen.merge(seen)
        if pin is not None or seen is not None:
            self._has_news()
            self.looked = 0.0

    def wanted(self, now: float) -> tuple[bool, Position | None]:
        """
        Return what the pins of earlier scopes ask for: whether only the primary will do, and the
        position that any other server must have, ``None``: none.
        """
        position: Position | None = None
        for name in ("carried", "seen"):
            pin: Pin | None = getattr(self, name)
            if pin is None:
                continue
            if pin.until <= now:
                setattr(self, name, None)
            elif pin.held_until > now:
                return True, None
            else:
                position = merge_positions(position, pin.position)
        return False, position

    def wrote_until(self, window: float, now: float) -> float:
        """Return until when what this scope did itself holds it on the primary."""
        until = max(self.by_hand + window if self.by_hand else 0.0, self.held)
        for write in self.writes.values():
            until = max(until, (write.ended(now) or now) + window)
        return until

    def leave(self, replica: str) -> None:
        """Choose another replica for the rest of the scope."""
        if self.replica == replica:
            self.replica = None
        if self.answer == replica:
            self.answer = None


class Scope(dict[str, Facts]):
    """
    One unit of work: what it knows of each pool, by the pool's key, made at the first use.

    ``is_lasting``: it has no end of its own (a shell, a thread that nobody gave a scope).
    """

    # What differs from these defaults is set; most requests set nothing but their end.
    __slots__ = ("__dict__",)

    # Whether its reads may go to replicas, as far as its pools have nothing against that.
    is_plain = True
    # The pins that it came with.
    carried: Pins = _NONE
    # Whether its method is one that reads from the primary.
    from_primary = False
    is_lasting = False
    # From here on it reads as if its view were decorated with `offload`.
    lifted = False
    # The scope that it was opened in, whose knowledge it shares.
    outer: Scope | None = None
    # The request that it was of, once that is over.
    ended: Any = None
    # The primaries, with their connections, on which Django opened a transaction for the view that
    # runs now.
    view_transactions: Mapping[str, Any] = MappingProxyType({})
    # Keys of a cache that are to be pinned when it ends, each with the primaries concerned.
    pinned_keys: Mapping[tuple[str, str | None], None] = MappingProxyType({})
    # Seconds to wait for a replica to catch up, None: as the settings say.
    wait: float | None = None
    # Whether it may read replicas at all, None: as the settings say; and who says so, asked once.
    offloads: bool | None = None
    ask_offload: Callable[[], bool] | None = None
    # Saves what was written after the scope had ended, given the request that it was of.
    saver: ClassVar[Callable[[Scope, Any], None] | None] = None

    @classmethod
    def of(cls, pins: Pins) -> Scope:
        """Return a scope that begins with these pins."""
        scope = cls()
        scope.carried = pins
        return scope

    # Two that know nothing are two all the same.
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __bool__(self) -> bool:
        # One that knows of no pool yet is a scope all the same.
        return True

    def __missing__(self, key: str) -> Facts:
        facts = Facts(key)
        if self.carried:
            primary = facts.primary
            facts.carry(self.carried.get(primary), self.carried.get(SEEN + primary))
        if self.outer is not None:
            facts.begin_in(self.outer[key])
        # Another thread of this scope may have been faster.
        return self.setdefault(key, facts)

    def carry(self, pins: Pins) -> None:
        """Take on pins of earlier scopes, beside those that are already carried."""
        if not pins:
            return
        self.carried = merge_pins(self.carried, pins)
        for facts in self.values():
            facts.carry(pins.get(facts.primary), pins.get(SEEN + facts.primary))

    def begin_in(self, outer: Scope) -> None:
        """Be open inside that scope from now on: know what it knows, and read as it does."""
        self.outer = outer
        for key, facts in self.items():
            facts.begin_in(outer[key])
        if not outer.is_lasting:
            self.from_primary = self.from_primary or outer.from_primary
            self.is_plain = self.is_plain and outer.is_plain
            self.lifted = self.lifted or outer.lifted
            self.offloads, self.ask_offload = outer.offloads, outer.ask_offload
            self.view_transactions = outer.view_transactions

    def is_inside(self, other: Scope) -> bool:
        """Return whether this is that scope, or was opened inside it."""
        scope: Scope | None = self
        while scope is not None and scope is not other:
            scope = scope.outer
        return scope is other

    def knows(self, key: str) -> bool:
        """Return whether this scope, or one around it, has facts of a pool."""
        scope: Scope | None = self
        while scope is not None and key not in scope:
            scope = scope.outer
        return scope is not None

    def tell(self, outer: Scope | None) -> None:
        """Let a scope around this one know what this one did."""
        if outer is not None:
            for key, facts in self.items():
                if facts.changes:
                    outer[key].take_over(facts)

    def read_primary(self) -> None:
        """Read from the primary, as a request of a method that most likely writes."""
        self.from_primary, self.is_plain = True, False

    def lift(self) -> None:
        """From here on, read as if everything were decorated with ``offload``."""
        self.lifted, self.is_plain = True, False
        self.forget_answers()

    def end(self, request: Any) -> None:
        """Let what outlives a request be no part of its method."""
        self.ended = request
        if self.from_primary:
            self.from_primary = False
            self.forget_answers()

    def save_late(self) -> None:
        """Save what a child task or a thread wrote after this had ended, where somebody can."""
        save = type(self).saver
        if save is not None:
            save(self, self.ended)

    def forget_answers(self) -> None:
        """Decide anew: a rule that counts for the whole scope has changed."""
        for facts in self.values():
            facts.answer = None


_scope: ContextVar[Scope | None] = ContextVar("pinning_scope", default=None)

entered_scope = _scope.get
# Enter a scope by `enter(scope)` and leave it by `enter(what was entered before)`: `reset(token)`
# raises where a scope is left in another context than it was entered in.
enter = _scope.set


def current_scope() -> Scope:
    """Return the scope of this unit of work; outside any, a lasting one of this context."""
    scope = _scope.get()
    if scope is None:
        scope = Scope()
        scope.is_lasting, scope.is_plain = True, False
        _scope.set(scope)
    return scope
