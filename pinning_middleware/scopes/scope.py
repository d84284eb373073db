"""
The state of a unit of work, for each pool: writes, pins and preferences. No I/O, no settings.

A scope is a mutable object in a context variable. Child tasks and the threads of
``sync_to_async`` copy the context and so share the object: a write in one of them is visible in
all. Another request has another object.

The state of a pool is an immutable value that is replaced as a whole, so the threads of a scope
read it without a lock.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from pinning_middleware.pins import (
    Pin,
    Pins,
    PoolKey,
    Position,
    merge_optional,
    merge_pins,
    merge_positions,
    pins_of,
)
from pinning_middleware.scopes import threads
from pinning_middleware.utils import clock
from pinning_middleware.utils.forks import ForkSafeLock

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

_NOTHING: Mapping[Any, Any] = MappingProxyType({})

_numbers = itertools.count()

# Held while a state is replaced, never during I/O.
_lock = ForkSafeLock()


class Write(NamedTuple):
    """
    The latest write of a scope on one connection. ``visible_at``: when its transaction ended
    (seconds since the epoch), None while it is open. ``connection``: None after that, since the
    thread that it belongs to may have ended. A later write has a higher ``number``.
    """

    connection: BaseDatabaseWrapper | None
    number: int
    visible_at: float | None = None

    @property
    def is_open(self) -> bool:
        """
        Whether its transaction may still be open.

        The transaction of a TestCase ends with the test; a write directly inside it counts as
        committed.
        """
        if self.visible_at is not None or self.connection is None:
            return False
        blocks = self.connection.atomic_blocks
        return not (blocks and all(block._from_testcase for block in blocks))  # type: ignore[attr-defined]


class Requirement(NamedTuple):
    """What the inherited pins of a scope require of a server that serves its reads."""

    primary_only: bool
    position: Position | None

    @property
    def is_empty(self) -> bool:
        """Whether any server meets it."""
        return not self.primary_only and self.position is None


_NO_REQUIREMENT = Requirement(False, None)


class PoolState(NamedTuple):
    """What a scope has done to one pool, and what it has inherited."""

    # The pins of earlier scopes: for what the client has written, and for what it has read.
    inherited: Pin | None = None
    observed: Pin | None = None
    # The latest write of each connection, by the id of the connection.
    writes: Mapping[int, Write] = _NOTHING
    # When pin_this_request() was called; until when, if it was given a duration (seconds since the
    # epoch).
    pinned_at: float | None = None
    pinned_until: float | None = None
    # pin_this_request(seconds=0), a locking read, or session state that replicas do not have keeps
    # the rest of the scope on the primary.
    pinned_for_scope: bool = False
    holds_lock: bool = False
    session_modified: bool = False
    # unpin_this_request(): the HTTP method no longer counts; the inherited pin was dropped.
    method_ignored: bool = False
    cleared: bool = False
    # Incremented by each change that affects the outgoing pins.
    revision: int = 0
    # When replicas were last probed in vain for the inherited position (monotonic clock).
    last_searched: float | None = None
    # Whether commits that a replica shows may be hidden on the primary; None if not checked.
    primary_hides_commits: bool | None = None
    # The aliases that it has read from, oldest first, each with the state of the connection;
    # recorded under monotonic-reads only.
    read_from: tuple[tuple[str, Any], ...] = ()
    # How many increments of ``revision`` are those of a scope's first read.
    first_reads: int = 0

    @property
    def is_pinned(self) -> bool:
        """Whether this scope itself pinned the pool."""
        return bool(self.writes) or self.pinned_at is not None or self.pinned_until is not None

    @property
    def has_open_write(self) -> bool:
        """Whether it has written in a transaction that has not ended."""
        return any(write.is_open for write in self.writes.values())

    def own_pin_end(self, window: float, now: float) -> float | None:
        """Return until when what this scope did pins it (seconds since the epoch), or None."""
        ends = [
            (now if w.visible_at is None else w.visible_at) + window for w in self.writes.values()
        ]
        if self.pinned_at is not None:
            ends.append(self.pinned_at + window)
        if self.pinned_until is not None:
            ends.append(self.pinned_until)
        return max(ends, default=None)

    def required(self, now: float) -> Requirement:
        """Return what the inherited pins require at this time (seconds since the epoch)."""
        if self.inherited is None and self.observed is None:
            return _NO_REQUIREMENT
        position: Position | None = None
        for pin in (self.inherited, self.observed):
            if pin is None or not pin.is_live(now):
                continue
            if pin.is_primary_only(now):
                return Requirement(True, None)
            position = merge_positions(position, pin.position)
        return Requirement(False, position)

    def inherit(self, pin: Pin | None, observed: Pin | None) -> PoolState:
        """Return the state with further pins of earlier scopes."""
        if pin is None and observed is None:
            return self
        return self._replace(
            inherited=merge_optional(self.inherited, pin),
            observed=merge_optional(self.observed, observed),
            last_searched=None,
        )

    def merge_parent(self, parent: PoolState) -> PoolState:
        """Return this state merged with that of the enclosing scope."""
        merged = self._merge_own(parent)._replace(
            read_from=_merge_reads(parent.read_from, self.read_from)
        )
        return merged.inherit(parent.inherited, parent.observed)

    def merge_inner(self, inner: PoolState) -> PoolState:
        """Return this state merged with that of an inner scope that has ended."""
        merged = self._merge_own(inner)._replace(
            revision=self.revision + inner.revision,
            first_reads=self.first_reads + inner.first_reads,
            read_from=_merge_reads(self.read_from, inner.read_from),
        )
        return merged.inherit(inner.inherited, inner.observed)

    def _merge_own(self, other: PoolState) -> PoolState:
        return self._replace(
            writes=_merge_writes(self.writes, other.writes),
            pinned_at=_latest(self.pinned_at, other.pinned_at),
            pinned_until=_latest(self.pinned_until, other.pinned_until),
            pinned_for_scope=self.pinned_for_scope or other.pinned_for_scope,
            holds_lock=self.holds_lock or other.holds_lock,
            session_modified=self.session_modified or other.session_modified,
        )


def _merge_writes(one: Mapping[int, Write], other: Mapping[int, Write]) -> Mapping[int, Write]:
    """Return the latest write of each connection, as it is known to have ended."""
    if not other:
        return one
    merged = dict(one)
    for connection, write in other.items():
        known = merged.get(connection)
        # One scope may still consider a write open whose end the other has recorded.
        is_later = known is None or (write.number, write.visible_at is not None) > (
            known.number,
            known.visible_at is not None,
        )
        if is_later:
            merged[connection] = write
    return merged


def _merge_reads(
    older: tuple[tuple[str, Any], ...], newer: tuple[tuple[str, Any], ...]
) -> tuple[tuple[str, Any], ...]:
    later = {alias for alias, _ in newer}
    return (*(one for one in older if one[0] not in later), *newer)


def _latest(one: float | None, other: float | None) -> float | None:
    return max((each for each in (one, other) if each is not None), default=None)


_INITIAL = PoolState()


class ReplicaChoice(NamedTuple):
    """
    The replica that a scope reads from, None if it has none; and since when (monotonic clock).
    """

    alias: str | None = None
    since: float = 0.0


_NO_CHOICE = ReplicaChoice()


class Scope:
    """
    One unit of work: a request, a task, a message, a ``pinning_scope()``; or, if ``is_ambient``,
    what runs outside all of them (a shell, a thread).
    """

    is_ambient = False
    # The scope that it was opened in, whose state it shares.
    parent: Scope | None = None
    # The pins that it began with, and those that it inherited later.
    inherited_pins: Pins = _NOTHING
    # Those of them that its client, or its message, had; the others are of keys that it follows.
    client_pins: Pins = _NOTHING
    # The request's method is one of PINNING_PRIMARY_METHODS, or its task prefers the primary.
    prefers_primary = False
    # offload_this_request() was called.
    offloaded = False
    # Whether it may read from replicas, None: not evaluated yet; and the function that decides.
    may_offload: bool | None = None
    offload_predicate: Callable[[], bool | None] | None = None
    # Seconds to wait for a replica to catch up, None: PINNING_WAIT.
    max_wait: float | None = None
    # Returns the key by which a user stays on one replica, None: unknown, so round robin.
    balance_key: Callable[[], str | None] | None = None
    # The connections on which Django has opened a transaction for the view that is running
    # (ATOMIC_REQUESTS), by alias.
    view_transactions: Mapping[str, Any] = _NOTHING
    # What to wrap the view in.
    wrap_view: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    # Whether a view must not be retried after a 404: one was, or retry_404(False) excludes it.
    retry_404_disabled = False
    # Keys to pin when it ends, each with the primary's alias that it was given with.
    keys: tuple[tuple[str, str | None], ...] = ()
    # The first routes of its reads (alias, reason), without consecutive duplicates.
    routes: tuple[tuple[str, str], ...] = ()
    # The fallbacks that were signalled.
    signalled: frozenset[tuple[PoolKey, str]] = frozenset()
    # The pins made for its writes, each with the revision that it covers: making one costs a round
    # trip.
    made_pins: Mapping[PoolKey, tuple[int, Pin]] = _NOTHING
    # Monotonic time at which a closed scope expires, so that code which still runs no longer
    # belongs to it. None while it is open.
    expires_at: float | None = None
    # Called with the scope for each fact that is recorded after it was closed. It does not refer to
    # the scope itself: a cycle would keep every request in memory until the garbage collector runs.
    on_late_change: Callable[[Scope], None] | None = None

    def __init__(self, pins: Pins = _NOTHING) -> None:
        self.pools: Mapping[PoolKey, PoolState] = _NOTHING
        # The replicas that it reads from, by pool and group (None: the replicas without groups). A
        # scope inside this one chooses its own.
        self.replicas: dict[PoolKey, dict[str | None, ReplicaChoice]] = {}
        if pins:
            self.inherited_pins = self.client_pins = pins

    def state(self, key: PoolKey) -> PoolState:
        """Return the state of a pool, even if nothing has happened to it yet."""
        state = self.pools.get(key)
        if state is not None:
            return state
        if not self.inherited_pins and self.parent is None:
            return _INITIAL
        state = PoolState(*pins_of(self.inherited_pins, key.primary))
        outer = _INITIAL if self.parent is None else self.parent.state(key)
        return state if outer is _INITIAL else state.merge_parent(outer)

    def update(self, key: PoolKey, change: Callable[[PoolState], PoolState]) -> PoolState:
        """Replace the state of a pool by what ``change`` makes of it, and return that."""
        with _lock:
            state = change(self.state(key))
            self.pools = {**self.pools, key: state}
        return state

    def has_state_for(self, key: PoolKey) -> bool:
        """
        Return whether anything has happened to a pool here or in an enclosing scope, or whether an
        enclosing scope began with pins.
        """
        outer = self.parent
        return key in self.pools or (
            outer is not None and (bool(outer.inherited_pins) or outer.has_state_for(key))
        )

    # The choice of replicas

    def replica(self, key: PoolKey, group: str | None = None) -> ReplicaChoice:
        """Return the replica that the scope reads from."""
        return self.replicas.get(key, _NOTHING).get(group, _NO_CHOICE)

    def keep_replica(self, key: PoolKey, alias: str | None, group: str | None = None) -> None:
        """Read from this replica from now on; None: choose the next one."""
        self.replicas.setdefault(key, {})[group] = ReplicaChoice(alias, clock.monotonic())

    # Recording

    def record_write(self, key: PoolKey, connection: BaseDatabaseWrapper) -> None:
        """Record the latest write on a connection, which becomes an outgoing pin."""

        number = next(_numbers)

        def change(state: PoolState) -> PoolState:
            writes = {**state.writes, id(connection): Write(connection, number)}
            return state._replace(writes=writes, revision=state.revision + 1)

        self.update(key, change)

    def record_visible(self, connection: BaseDatabaseWrapper, at: float) -> None:
        """Record that the transaction of a connection has ended (seconds since the epoch)."""

        def change(state: PoolState) -> PoolState:
            known = state.writes.get(id(connection))
            number = next(_numbers) if known is None else known.number
            writes = {**state.writes, id(connection): Write(None, number, at)}
            return state._replace(writes=writes, revision=state.revision + 1)

        for key, state in self.pools.items():
            write = state.writes.get(id(connection))
            if write is not None and write.visible_at is None:
                self.update(key, change)

    def record_lock(self, key: PoolKey) -> None:
        """Record a locking read."""
        self.update(key, lambda state: state._replace(holds_lock=True))

    def record_session_state(self, key: PoolKey, *, is_modified: bool = True) -> None:
        """Record whether the code has changed the session of the primary's connection."""
        self.update(key, lambda state: state._replace(session_modified=is_modified))

    def pin(self, key: PoolKey, seconds: float | None) -> None:
        """
        Pin a pool. ``seconds``: None for the window, 0 for the rest of the scope, otherwise that
        long, even if a replica catches up earlier.
        """
        now = clock.now()

        def change(state: PoolState) -> PoolState:
            changed = state._replace(revision=state.revision + 1)
            if seconds is None:
                return changed._replace(pinned_at=now)
            if seconds:
                return changed._replace(pinned_until=_latest(state.pinned_until, now + seconds))
            return changed._replace(pinned_for_scope=True)

        self.update(key, change)

    def unpin(self, key: PoolKey, *, ignore_method: bool) -> None:
        """Forget why a pool is pinned, inherited pins included."""

        def change(state: PoolState) -> PoolState:
            has_pin = state.is_pinned or state.inherited is not None or state.observed is not None
            return PoolState(
                session_modified=state.session_modified,
                method_ignored=ignore_method,
                cleared=state.cleared or has_pin,
                revision=state.revision + has_pin,
                read_from=state.read_from,
                first_reads=state.first_reads,
            )

        self.update(key, change)

    def inherit(self, pins: Pins, *, of_client: bool = True) -> None:
        """Inherit further pins of earlier scopes: of its client's, or of keys that it follows."""
        if not pins:
            return
        if of_client:
            self.client_pins = merge_pins(self.client_pins, pins)
        self.inherited_pins = merge_pins(self.inherited_pins, pins)
        for key in self.pools:
            self.update(key, lambda state, key=key: state.inherit(*pins_of(pins, key.primary)))  # type: ignore[misc]

    def record_route(self, route: tuple[str, str], limit: int) -> None:
        """Record where a read went and why, unless it repeats the last route, up to a limit."""
        routes = self.routes
        if len(routes) < limit and routes[-1:] != (route,):
            self.routes = (*routes, route)

    # Nesting and closing

    def attach_to(self, parent: Scope) -> None:
        """Make ``parent`` the enclosing scope: inherit its state and its routing preferences."""
        self.parent = parent
        for key in self.pools:
            outer = parent.state(key)
            self.update(key, lambda state, outer=outer: state.merge_parent(outer))  # type: ignore[misc]
        if not parent.is_ambient:
            self.prefers_primary = self.prefers_primary or parent.prefers_primary
            self.offloaded = self.offloaded or parent.offloaded
            self.may_offload, self.offload_predicate = parent.may_offload, parent.offload_predicate
            self.view_transactions = parent.view_transactions
            self.balance_key = parent.balance_key
            self.max_wait = parent.max_wait if self.max_wait is None else self.max_wait

    def merge_into(self, outer: Scope) -> None:
        """Merge the state of this scope into an enclosing one."""
        for key, state in self.pools.items():
            if state.revision or state.read_from or state.holds_lock or state.session_modified:
                outer.update(key, lambda before, state=state: before.merge_inner(state))  # type: ignore[misc]

    @property
    def is_closed(self) -> bool:
        """Whether its unit of work has ended."""
        return self.expires_at is not None

    def extend(self, seconds: float) -> None:
        """Let code that outlives a closed scope belong to it for this many seconds more."""
        if self.expires_at is not None:
            self.expires_at = max(self.expires_at, clock.monotonic() + seconds)

    def close(self, seconds: float, on_late_change: Callable[[Scope], None] | None) -> None:
        """
        End the unit of work. For ``seconds``, code that outlives it still belongs to it, and
        ``on_late_change`` is called with the scope for what that code does.
        """
        self.prefers_primary = False
        self.on_late_change = on_late_change
        self.expires_at = clock.monotonic() + seconds

    @property
    def revision(self) -> int:
        """A number that grows with each change that affects the outgoing pins."""
        number = len(self.keys)
        for state in self.pools.values():
            number += state.revision
        return number

    @property
    def write_revision(self) -> int:
        """The revision without what the scope has read."""
        return self.revision - sum(state.first_reads for state in self.pools.values())


_scope: ContextVar[Scope | None] = ContextVar("pinning_scope", default=None)
_get = threads.getter(_scope)

# Enter a scope by `enter(scope)` and leave it by `enter(the previous one)`: `reset(token)` raises
# if a scope is left in another context than it was entered in.
enter = _scope.set


def entered_scope() -> Scope | None:
    """Return the scope of this unit of work, None outside any."""
    scope = _get()
    if scope is not None and scope.expires_at is not None and clock.monotonic() >= scope.expires_at:
        # A background task that outlives the request which started it.
        _scope.set(None)
        return None
    return scope


def current_scope() -> Scope:
    """Return the scope of this unit of work; outside any, an ambient one of this context."""
    scope = entered_scope()
    if scope is None:
        scope = Scope()
        scope.is_ambient = True
        _scope.set(scope)
    return scope
