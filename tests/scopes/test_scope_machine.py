"""
The scopes of one client as a state machine: whatever it does, no read goes to a replica that lacks
what the scope has written or inherited.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import pytest
from django.db import transaction
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pinning_middleware import pin_this_request, pinning_scope, unpin_this_request
from pinning_middleware.pins import Position
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.replica_set import ReplicaSet
from pinning_middleware.scope_blocks import PinningScope
from pinning_middleware.scopes.scope import enter
from pinning_middleware.utils import clock
from tests.app.models import Book
from tests.conftest import is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

WINDOW = 15.0
REPLICAS = ("replica1", "replica2")


class Known:
    """
    The model: the offsets in the primary's log that a scope must see, each with the end of the
    window that protects it. It is infinite if a position does.
    """

    def __init__(self, *others: dict[int, float]) -> None:
        self.until: dict[int, float] = {}
        for other in others:
            self.add(other)

    def add(self, other: dict[int, float]) -> None:
        for offset, end in other.items():
            self.until[offset] = max(end, self.until.get(offset, 0.0))

    def required(self, now: float) -> int:
        """Return the offset that a replica must have reached."""
        return max((offset for offset, end in self.until.items() if end > now), default=0)


class Frame:
    """A scope, or what runs outside all (``block`` is None)."""

    def __init__(self, block: PinningScope | None, outer: Frame | None, known: Known) -> None:
        self.block, self.outer, self.known = block, outer, known
        # What it has written, or a scope inside it, and when.
        self.written: dict[int, float] = {}
        self.is_open = True

    @property
    def lineage(self) -> list[Frame]:
        """Itself and the scopes around it."""
        return [self, *(self.outer.lineage if self.outer else ())]


class Scopes(RuleBasedStateMachine):
    """
    The log of the primary, and how far each replica has replayed it, replace the servers. Scopes,
    routing, transactions and tokens are those of the package.
    """

    reports: bool  # whether the primary reports positions
    reads_always = False

    def __init__(self) -> None:
        super().__init__()
        self.now, self.end = 1_000_000.0, 0
        self.replayed = dict.fromkeys(REPLICAS, 0)
        self.frames = [Frame(None, None, Known())]
        self.left: list[Frame] = []
        self.tokens: list[tuple[str | None, Known]] = [(None, Known())]
        self.pending: list[Frame] = []
        self.atomic: Any = None
        self.steps_left = 0
        self.quiet_since = self.now
        self.patches = ExitStack()
        patch = self.patches.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(clock, "now", lambda: self.now)
        patch.setattr(clock, "monotonic", lambda: self.now)
        patch.setattr(pools().by_primary["default"], "supports_positions", self.reports)
        patch.setattr(Pool, "current_position", lambda pool: self.position())
        for name in ("caught_up", "probe_caught_up"):
            patch.setattr(ReplicaSet, name, self.caught_up)
        enter(None)

    def position(self) -> Position | None:
        return Position({"log": self.end}) if self.reports else None

    def caught_up(self, alias: str, wanted: Position, *args: Any, **kwargs: Any) -> bool:
        return self.replayed[alias] >= wanted.points["log"]

    @property
    def frame(self) -> Frame:
        return self.frames[-1]

    # What the client does

    @rule()
    def write(self) -> None:
        self.quiet_since = self.now
        Book.objects.create(title="x")
        self.pending.append(self.frame)
        if self.atomic is None:
            self.become_visible()
        else:
            self.frame.known.add({self.end + 1: self.now + WINDOW})

    def become_visible(self) -> None:
        self.end += 1
        for frame in self.pending:
            self.learn(frame, {self.end: self.now})
        self.pending.clear()

    def learn(self, frame: Frame, written: dict[int, float]) -> None:
        """Outside all scopes, and without positions, a write is protected for a window."""
        is_positioned = self.reports and frame.block is not None
        frame.written |= written
        frame.known.add(
            {offset: math.inf if is_positioned else at + WINDOW for offset, at in written.items()}
        )
        if not frame.is_open and frame.outer is not None:
            self.learn(frame.outer, written)

    @precondition(lambda self: self.atomic is None)
    @rule(steps=st.integers(1, 5))
    def begin(self, steps: int) -> None:
        self.atomic, self.steps_left = transaction.atomic(), steps
        self.atomic.__enter__()

    @precondition(lambda self: self.atomic is not None)
    @rule(rolls_back=st.booleans())
    def end_transaction(self, rolls_back: bool) -> None:
        assert self.atomic is not None
        self.quiet_since = self.now
        if rolls_back:
            transaction.set_rollback(True)
            self.pending.clear()
            self.end += 1
        self.atomic.__exit__(None, None, None)
        self.atomic = None
        if self.pending:
            self.become_visible()

    @precondition(lambda self: len(self.frames) < 4)
    @rule(data=st.data(), isolated=st.booleans())
    def enter_scope(self, data: st.DataObject, isolated: bool) -> None:
        token, known = data.draw(st.sampled_from([self.tokens[0], *self.tokens[-3:]]))
        block = pinning_scope(token, isolated)
        block.__enter__()
        outer = None if isolated else self.frame
        inherited = Known(known.until, outer.known.until if outer else {})
        self.frames.append(Frame(block, outer, inherited))

    @precondition(lambda self: self.frame.block is not None)
    @rule()
    def leave_scope(self) -> None:
        frame = self.frames.pop()
        assert frame.block is not None
        frame.block.__exit__(None, None, None)
        frame.is_open = False
        self.learn(frame, frame.written)
        self.left.append(frame)
        self.take_token_of(frame)

    @precondition(lambda self: self.left or self.frame.block is not None)
    @rule(data=st.data())
    def take_token(self, data: st.DataObject) -> None:
        self.take_token_of(
            data.draw(st.sampled_from([f for f in (*self.frames, *self.left) if f.block]))
        )

    def take_token_of(self, frame: Frame) -> None:
        assert frame.block is not None
        known = Known(frame.known.until)
        if self.pending:
            # The position would not include the open transaction, so only the window counts.
            known.until = {
                offset: min(end, self.now + WINDOW) if offset in frame.written else end
                for offset, end in known.until.items()
            }
        self.tokens.append((frame.block.token, known))

    @rule(seconds=st.sampled_from([None, 5]))
    def pin(self, seconds: float | None) -> None:
        self.quiet_since = self.now + (seconds or 0)
        pin_this_request(seconds=seconds)

    @rule()
    def unpin(self) -> None:
        unpin_this_request()
        self.frame.written = {}
        # A scope inside it that has done nothing itself shares its state, also after its end.
        for frame in (self.frame, *self.left):
            if self.frame in frame.lineage:
                frame.known = Known()
        self.pending = [frame for frame in self.pending if frame is not self.frame]

    # What happens to it

    @rule(seconds=st.sampled_from([1.0, 6.0, 16.0]))
    def step_clock(self, seconds: float) -> None:
        self.now += seconds

    @rule(alias=st.sampled_from(REPLICAS), lag=st.integers(0, 2))
    def replay(self, alias: str, lag: int) -> None:
        self.replayed[alias] = max(self.replayed[alias], self.end - lag)

    # What must hold

    @initialize(always=st.booleans())
    def choose_when_to_read(self, always: bool) -> None:
        self.reads_always = always

    @invariant()
    def after_each_step(self) -> None:
        if self.reads_always:
            self.read()
        if self.atomic is not None:
            self.steps_left -= 1
            if not self.steps_left:
                self.end_transaction(rolls_back=False)

    @rule()
    def read(self) -> None:
        alias = where()
        if alias in self.replayed:
            assert self.replayed[alias] >= self.frame.known.required(self.now)
            assert self.atomic is None
        is_over = self.now > self.quiet_since + WINDOW + 1 and self.atomic is None
        if is_over and set(self.replayed.values()) == {self.end}:
            assert is_replica(alias)

    def teardown(self) -> None:
        self.read()
        while self.frame.block is not None:
            self.leave_scope()
            self.read()
        if self.atomic is not None:
            self.end_transaction(rolls_back=True)
        enter(None)
        self.patches.close()


@pytest.mark.parametrize("reports", [True, False], ids=["positions", "window"])
def test_scope_never_reads_a_replica_that_lacks_what_it_has_inherited(reports: bool) -> None:
    machine = type("Scopes", (Scopes,), {"reports": reports})
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=50))
