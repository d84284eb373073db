"""What a scope leaves behind, if its primary reports positions."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connections
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware.pins import POSITION_LIFETIME, Pin, PinKey, PinKind, Position
from pinning_middleware.routing.outgoing import outgoing_pins
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.scope import Scope
from pinning_middleware.utils import clock as package_clock

WINDOW = 15.0
DEFAULT, OBSERVED = PinKey("default"), PinKey("default", PinKind.OBSERVED)


class Primary:
    """The log of a primary, which grows with each write."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.end, self.probes = pool, 0, 0

    @property
    def position(self) -> Position:
        return Position({"ff-1": self.end})

    def write(self, scope: Scope) -> None:
        self.end += 10
        scope.record_write(self.pool.key, connections["default"])
        scope.record_visible(connections["default"], package_clock.now())


@pytest.fixture
def primary(monkeypatch: pytest.MonkeyPatch, clock: FrozenDateTimeFactory) -> Primary:
    pool = pools().by_primary["default"]
    found = Primary(pool)

    def current_position(self: Pool) -> Position:
        found.probes += 1
        return found.position

    monkeypatch.setattr(pool, "supports_positions", True)
    monkeypatch.setattr(Pool, "current_position", current_position)
    return found


def test_scope_that_wrote_leaves_a_pin_with_the_position(primary: Primary) -> None:
    scope = Scope()
    primary.write(scope)
    now = package_clock.now()
    assert outgoing_pins(scope) == {DEFAULT: Pin(now + WINDOW, None, primary.position)}


def test_scope_that_did_not_write_asks_for_no_position(primary: Primary) -> None:
    inherited = {DEFAULT: Pin(package_clock.now() + 5, None, Position({"ff-1": 1}))}
    assert outgoing_pins(Scope(inherited)) == inherited
    assert outgoing_pins(Scope()) == {}
    assert primary.probes == 0


def test_position_is_asked_for_once_after_each_write(primary: Primary) -> None:
    scope = Scope()
    for probes in (1, 2):
        primary.write(scope)
        for _ in range(3):
            assert outgoing_pins(scope)[DEFAULT].position == primary.position
        assert primary.probes == probes


def test_inherited_position_is_left_behind_after_its_window(
    primary: Primary, clock: FrozenDateTimeFactory
) -> None:
    pins = {
        DEFAULT: Pin(package_clock.now() + WINDOW, None, Position({"ff-1": 1})),
        OBSERVED: Pin(package_clock.now() + WINDOW, None, Position({"ff-1": 2})),
    }
    clock.tick(WINDOW + 5)
    assert outgoing_pins(Scope(pins)) == pins
    clock.tick(POSITION_LIFETIME)
    assert outgoing_pins(Scope(pins)) == {}


def test_inherited_pin_without_position_is_not_left_behind_after_its_window(
    primary: Primary, clock: FrozenDateTimeFactory
) -> None:
    pins = {DEFAULT: Pin(package_clock.now() + WINDOW)}
    clock.tick(WINDOW + 5)
    assert outgoing_pins(Scope(pins)) == {}


def test_scope_that_lasts_longer_than_the_window_leaves_its_position(
    primary: Primary, clock: FrozenDateTimeFactory
) -> None:
    scope = Scope()
    primary.write(scope)
    clock.tick(WINDOW + 5)
    assert outgoing_pins(scope)[DEFAULT].position == primary.position


def test_position_of_an_ended_inner_scope_is_left_behind_by_the_outer_one(
    primary: Primary,
) -> None:
    outer, inner = Scope(), Scope()
    inner.attach_to(outer)
    primary.write(inner)
    inner.merge_into(outer)
    assert outgoing_pins(outer)[DEFAULT].position == primary.position


def test_inner_scope_that_has_read_nothing_leaves_the_pins_of_the_outer_one(
    primary: Primary,
) -> None:
    pins = {DEFAULT: Pin(package_clock.now() + 5, None, Position({"ff-1": 1}))}
    outer, inner, innermost = Scope(pins), Scope(), Scope()
    inner.attach_to(outer)
    innermost.attach_to(inner)
    assert outgoing_pins(inner) == outgoing_pins(innermost) == pins


def test_observed_pin_of_an_inner_scope_is_taken_over(primary: Primary) -> None:
    outer, inner = Scope(), Scope()
    inner.attach_to(outer)
    key = primary.pool.key
    outer.state(key)
    inner.inherit({OBSERVED: Pin(package_clock.now() + WINDOW, None, Position({"ff-1": 2}))})
    primary.write(inner)
    inner.merge_into(outer)
    assert outer.state(key).observed is not None


def test_unpinning_drops_both_kinds(primary: Primary) -> None:
    position = Position({"ff-1": 1})
    pins: Any = {key: Pin(package_clock.now() + 5, None, position) for key in (DEFAULT, OBSERVED)}
    scope = Scope(pins)
    scope.unpin(primary.pool.key, ignore_method=False)
    assert outgoing_pins(scope) == {}
