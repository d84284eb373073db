"""Pins and positions: serialised form, merging, and how long each of them counts."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinning_middleware.pins import (
    POSITION_LIFETIME,
    Pin,
    PinKey,
    PinKind,
    Pins,
    Points,
    Position,
    live,
    merge_optional,
    merge_pins,
    merge_points,
    merge_positions,
    pack,
    pins_of,
    unpack,
    within_window,
)
from tests.strategies import KEYS, PINS_OF_SAME_LOGS, REPLAYED, pins, positions

DEFAULT, USERS = PinKey("default"), PinKey("users")
OBSERVED = PinKey("default", PinKind.OBSERVED)

# Keys


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (PinKey("default"), "w:default"),
        (PinKey("default", PinKind.OBSERVED), "o:default"),
        (PinKey("default", PinKind.DRY_RUN), "d:default"),
        (PinKey("a:b~?"), "w:a:b~?"),
        (PinKey(""), "w:"),
        (PinKey(None), "w"),
        (PinKey(None, PinKind.OBSERVED), "o"),
    ],
)
def test_key_is_loaded_from_its_serialised_form(key: PinKey, text: str) -> None:
    assert key.dump() == text
    assert PinKey.load(text) == key


@pytest.mark.parametrize("text", ["", "default", ":default", "x:default", "~default", "W:default"])
def test_key_of_an_unknown_kind_raises_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="PinKind"):
        PinKey.load(text)


def test_pins_of_returns_both_kinds_of_one_pool() -> None:
    pins = {DEFAULT: Pin(1.0), OBSERVED: Pin(2.0), USERS: Pin(3.0)}
    assert pins_of(pins, "default") == (Pin(1.0), Pin(2.0))
    assert pins_of(pins, "users") == (Pin(3.0), None)
    assert pins_of({}, "default") == (None, None)


# Serialised form

PINS: list[dict[PinKey, Pin]] = [
    {},
    {DEFAULT: Pin(100.0)},
    {DEFAULT: Pin(100.5, None, Position({"1": 2**63}))},
    {DEFAULT: Pin(100.5, 90.0, Position({"1": 5, "2": 7})), USERS: Pin(3.0)},
    {DEFAULT: Pin(100.5, None, Position({"0-1": 5, "5-1": 7}, frozenset({"5-1"})))},
    {DEFAULT: Pin(100.5, 0.0, Position({"a": 0, "b": 1}, frozenset({"a", "b"})))},
    {DEFAULT: Pin(9.0), OBSERVED: Pin(8.0, None, Position({"1": 5})), PinKey(None): Pin(7.0)},
]


@pytest.mark.parametrize("pins", PINS)
def test_unpack_returns_what_was_packed(pins: dict[PinKey, Pin]) -> None:
    assert unpack(json.loads(json.dumps(pack(pins)))) == pins


def test_pack_omits_defaults_and_rounds_to_milliseconds() -> None:
    position = Position({"1": 5})
    optional = Position({"b": 1, "a": 2}, frozenset({"b", "a"}))
    assert pack(
        {
            DEFAULT: Pin(100.0004),
            OBSERVED: Pin(100.0, None, position),
            USERS: Pin(100.0, 90.0004, position),
            PinKey(None): Pin(100.0, None, optional),
        }
    ) == {
        "w:default": [100.0],
        "o:default": [100.0, None, {"1": 5}],
        "w:users": [100.0, 90.0, {"1": 5}],
        "w": [100.0, None, {"b": 1, "a": 2}, ["a", "b"]],
    }


@pytest.mark.parametrize(
    "packed",
    [
        None,
        [],
        "w:default",
        {"w:default": None},
        {"w:default": 100},
        {"w:default": []},
        {"w:default": [1, 2]},
        {"w:default": [1, 2, {"a": 5}, [], 5]},
        {"w:default": ["100"]},
        {"w:default": [True]},
        {"w:default": [None]},
        {"w:default": [float("inf")]},
        {"w:default": [float("nan")]},
        {"w:default": [1, "0", {"a": 5}]},
        {"w:default": [1, float("inf"), {"a": 5}]},
        {"w:default": [1, 0, {}]},
        {"w:default": [1, 0, None]},
        {"w:default": [1, 0, [5]]},
        {"w:default": [1, 0, {"a": 1.5}]},
        {"w:default": [1, 0, {"a": True}]},
        {"w:default": [1, 0, {"a": "5"}]},
        {"w:default": [1, 0, {7: 5}]},
        {"w:default": [1, 0, {"a": 5}, "a"]},
        {"w:default": [1, 0, {"a": 5}, {"a": 5}]},
        {"w:default": [1, 0, {"a": 5}, None]},
        {"w:default": [1, 0, {"a": 5}, [7]]},
        {7: [1]},
        {"default": [1]},
        {"~default": [1]},
    ],
)
def test_unpack_of_anything_else_raises_value_error(packed: Any) -> None:
    with pytest.raises(ValueError, match=r"pin|position|offset|optional|times|names|PinKind"):
        unpack(packed)


# Positions


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ({}, {}, {}),
        ({"1": 5}, {}, {"1": 5}),
        ({"1": 10}, {"1": 9}, {"1": 10}),
        ({"1": 5, "2": 1}, {"1": 4, "3": 0}, {"1": 5, "2": 1, "3": 0}),
    ],
)
def test_merged_points_have_the_larger_offset_of_each_log(
    one: Points, other: Points, both: Points
) -> None:
    assert merge_points(one, other) == merge_points(other, one) == both


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (None, None, None),
        (Position({"1": 5}), None, Position({"1": 5})),
        (Position({"1": 5}), Position({"1": 7}), Position({"1": 7})),
        (
            Position({"1": 5, "2": 1}),
            Position({"1": 4, "3": 2}),
            Position({"1": 5, "2": 1, "3": 2}),
        ),
    ],
)
def test_merged_position_includes_both(
    one: Position | None, other: Position | None, both: Position | None
) -> None:
    assert merge_positions(one, other) == merge_positions(other, one) == both


@pytest.mark.parametrize("one", [frozenset(), frozenset({"a"})])
@pytest.mark.parametrize("other", [frozenset(), frozenset({"b"})])
def test_log_of_only_one_position_stays_optional_or_required(
    one: frozenset[str], other: frozenset[str]
) -> None:
    first, second = Position({"a": 1}, one), Position({"b": 1}, other)
    expected = Position({"a": 1, "b": 1}, one | other)
    assert merge_positions(first, second) == merge_positions(second, first) == expected


def test_log_is_optional_only_if_it_is_in_both_positions() -> None:
    optional = Position({"a": 5}, frozenset({"a"}))
    required = Position({"a": 3})
    assert merge_positions(optional, optional) == optional
    assert merge_positions(optional, required) == Position({"a": 5})
    assert merge_positions(required, optional) == Position({"a": 5})


# How long a pin counts


def test_pin_without_position_counts_until_its_end() -> None:
    pins = {PinKey("early"): Pin(10.0), PinKey("late"): Pin(20.0)}
    assert live(pins, 9.9) == pins
    assert live(pins, 10.0) == {PinKey("late"): Pin(20.0)}
    assert live(pins, 20.0, 15.0) == {}


def test_pin_with_position_counts_for_its_lifetime_after_the_write() -> None:
    window, written = 15.0, 1000.0
    pin = Pin(written + window, None, Position({"1": 9}))
    end = written + POSITION_LIFETIME
    assert pin.is_live(written + window, window)
    assert pin.is_live(end - 0.1, window)
    assert not pin.is_live(end, window)
    assert live({DEFAULT: pin}, end - 0.1, window) == {DEFAULT: pin}
    assert live({DEFAULT: pin}, end, window) == {}


def test_window_longer_than_the_lifetime_of_positions_is_kept() -> None:
    window = 2 * POSITION_LIFETIME
    pin = Pin(window, None, Position({"1": 9}))
    assert pin.is_live(window - 1, window)
    assert not pin.is_live(window, window)


def test_pin_is_within_its_window_until_its_end_also_with_a_position() -> None:
    pins = {DEFAULT: Pin(10.0, None, Position({"1": 9})), USERS: Pin(20.0)}
    assert within_window(pins, 9.9) == pins
    assert within_window(pins, 10.0) == {USERS: Pin(20.0)}
    assert within_window(pins, 20.0) == {}


@pytest.mark.parametrize(
    ("pin", "end"),
    [
        (Pin(100.0), 100.0),
        (Pin(100.0, 50.0), 100.0),
        (Pin(100.0, None, Position({"1": 9})), None),
        (Pin(100.0, 50.0, Position({"1": 9})), 50.0),
        (Pin(100.0, 120.0, Position({"1": 9})), 120.0),
    ],
)
def test_pin_is_primary_only_until_its_position_counts(pin: Pin, end: float | None) -> None:
    if end is None:
        assert not pin.is_primary_only(0.0)
        return
    assert pin.primary_only_end == end
    assert pin.is_primary_only(end - 0.1)
    assert not pin.is_primary_only(end)


# Merging pins


def test_merged_pins_keep_the_latest_end_and_the_newest_position() -> None:
    one = {DEFAULT: Pin(100.0, 50.0, Position({"1": 9})), USERS: Pin(7.0)}
    other = {DEFAULT: Pin(90.0, 60.0, Position({"1": 10}))}
    merged = {DEFAULT: Pin(100.0, 60.0, Position({"1": 10})), USERS: Pin(7.0)}
    assert merge_pins(one, other) == merge_pins(other, one) == merged
    assert merge_pins() == {}


def test_kinds_of_pins_are_merged_apart() -> None:
    one = {DEFAULT: Pin(100.0), OBSERVED: Pin(90.0)}
    merged = merge_pins(one, {OBSERVED: Pin(95.0)})
    assert {key: pin.until for key, pin in merged.items()} == {DEFAULT: 100.0, OBSERVED: 95.0}


def test_pin_without_position_delays_the_position_of_another() -> None:
    merged = Pin(10.0).merge(Pin(9.0, None, Position({"1": 5})))
    assert merged == Pin(10.0, 10.0, Position({"1": 5}))
    assert merged.primary_only_end == 10.0


def test_merge_of_other_logs_is_primary_only_until_the_older_window_ends() -> None:
    """No replica may ever follow the log of a former primary again."""
    old, new = Pin(100.0, None, Position({"ff-1": 9})), Pin(105.0, None, Position({"ff-2": 3}))
    assert old.merge(new) == new.merge(old) == Pin(105.0, 100.0, Position({"ff-2": 3}))


@pytest.mark.parametrize(
    ("older", "newer", "merged"),
    [
        # A promoted server has a log of its own, and all of the former primary's.
        ({"a": 5}, {"a": 5, "b": 1}, {"a": 5, "b": 1}),
        # Transactions that were running at the time have committed since.
        ({"a": 5, "a/7": 8}, {"a": 9}, {"a": 9, "a/7": 8}),
        ({"a": 5}, {"a/7": 9}, {"a": 5, "a/7": 9}),
    ],
)
def test_merge_with_a_position_that_has_every_required_log_counts_at_once(
    older: dict[str, int], newer: dict[str, int], merged: dict[str, int]
) -> None:
    pin = Pin(10.0, None, Position(older)).merge(Pin(20.0, None, Position(newer)))
    assert pin == Pin(20.0, None, Position(merged))


def test_merge_optional_returns_none_without_any_pin() -> None:
    assert merge_optional(None, None) is None
    assert merge_optional(Pin(1.0), None) == merge_optional(None, Pin(1.0)) == Pin(1.0)
    assert normalised(merge_optional(Pin(1.0), Pin(2.0))) == normalised(Pin(2.0))


# Laws of merging

WINDOW = 5.0
# During all windows, after them, and before the end of a position's life.
TIMES = [*(t / 2 for t in range(16)), POSITION_LIFETIME - 5, POSITION_LIFETIME - 1]


def rejects(pin: Pin, now: float, replayed: Points) -> bool:
    """Return whether a replica must not serve, by this pin."""
    if not pin.is_live(now, WINDOW):
        return False
    if pin.is_primary_only(now):
        return True
    position = pin.position or Position({})
    return any(
        replayed.get(log, -1) < offset
        for log, offset in position.points.items()
        if log not in position.optional or log in replayed
    )


def normalised(pin: Pin | None) -> Any:
    return pin and (pin.until, pin.primary_only_end, pin.position)


@st.composite
def merged_in_any_order(draw: st.DrawFn, parts: list[Pin]) -> Pin:
    """Merge pins two at a time, any of them more than once, until one is left."""
    left = [*parts, *draw(st.lists(st.sampled_from(parts), max_size=2))]
    while len(left) > 1:
        left = draw(st.permutations(left))
        left = [left[0].merge(left[1]), *left[2:]]
    return left[0]


@given(st.none() | positions(), st.none() | positions(), st.none() | positions())
def test_merging_positions_is_commutative_associative_and_idempotent(
    one: Position | None, two: Position | None, three: Position | None
) -> None:
    assert merge_positions(one, two) == merge_positions(two, one)
    left = merge_positions(merge_positions(one, two), three)
    assert left == merge_positions(one, merge_positions(two, three))
    assert merge_positions(one, one) == one


@given(pins(), pins())
def test_merging_pins_is_commutative_and_idempotent(one: Pin, other: Pin) -> None:
    assert normalised(one.merge(other)) == normalised(other.merge(one))
    assert normalised(one.merge(one)) == normalised(one)


@given(PINS_OF_SAME_LOGS, PINS_OF_SAME_LOGS, PINS_OF_SAME_LOGS)
def test_merging_pins_of_the_same_logs_is_associative(one: Pin, two: Pin, three: Pin) -> None:
    left, right = one.merge(two).merge(three), one.merge(two.merge(three))
    assert normalised(left) == normalised(right)


@given(st.data(), st.lists(PINS_OF_SAME_LOGS, min_size=1, max_size=4), REPLAYED)
def test_merging_pins_of_the_same_logs_shortens_none(
    data: st.DataObject, parts: list[Pin], replayed: Points
) -> None:
    """Neither within the windows, nor afterwards, while positions still count."""
    merged = data.draw(merged_in_any_order(parts))
    for now in TIMES:
        assert rejects(merged, now, replayed) >= max(rejects(p, now, replayed) for p in parts)


@given(st.data(), st.lists(pins(), min_size=1, max_size=4), REPLAYED)
def test_merging_pins_of_other_logs_shortens_none_within_its_own_window(
    data: st.DataObject, parts: list[Pin], replayed: Points
) -> None:
    """In any order, and although the order may decide which position counts afterwards."""
    merged = data.draw(merged_in_any_order(parts))
    assert merged.until == max(part.until for part in parts)
    for now in TIMES:
        for part in parts:
            if now < part.until and rejects(part, now, replayed):
                assert rejects(merged, now, replayed)


@given(st.data(), st.lists(pins(), min_size=1, max_size=4))
def test_merged_pin_lasts_no_longer_than_the_longest_of_its_parts(
    data: st.DataObject, parts: list[Pin]
) -> None:
    """Nobody gets a longer window, or a position that was not written, by presenting several."""
    merged = data.draw(merged_in_any_order(parts))
    assert merged.primary_only_end <= max(
        end for p in parts for end in (p.until, p.primary_only_until or 0)
    )
    known = [part.position.points.items() for part in parts if part.position]
    for point in merged.position.points.items() if merged.position else ():
        assert any(point in points for points in known)


@given(st.lists(st.dictionaries(KEYS, PINS_OF_SAME_LOGS), max_size=4), st.randoms())
def test_merging_pins_of_many_requests_keeps_each_pool(
    several: list[Pins], generator: random.Random
) -> None:
    shuffled = generator.sample(several, len(several))
    merged, other = merge_pins(*several), merge_pins(*shuffled)
    assert merged.keys() == other.keys() == {key for pins in several for key in pins}
    assert {k: normalised(p) for k, p in merged.items()} == {
        k: normalised(p) for k, p in other.items()
    }


@given(st.dictionaries(KEYS, pins(times=st.floats(1, 4e9))))
def test_serialised_pins_keep_positions_and_times_to_the_millisecond(pins: Pins) -> None:
    found = unpack(json.loads(json.dumps(pack(pins))))
    assert found.keys() == pins.keys()
    for key, pin in pins.items():
        assert found[key].position == pin.position
        assert found[key].until == pytest.approx(pin.until, abs=0.00051)
        assert found[key].primary_only_end == pytest.approx(pin.primary_only_end, abs=0.00051)
