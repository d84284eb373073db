from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pinning_middleware.pins import Pin, live, merge_pins, merge_positions, pack, unpack

PINS = [
    {},
    {"default": Pin(100.0)},
    {"default": Pin(100.5, 90.0)},
    {"default": Pin(100.5, 0.0, {"1": 2**63})},
    {"default": Pin(100.5, 90.0, {"1": 5, "2": 7}), "users": Pin(3.0)},
]


@pytest.mark.parametrize("pins", PINS)
def test_what_is_packed_is_unpacked(pins: dict[str, Pin]) -> None:
    assert unpack(json.loads(json.dumps(pack(pins)))) == pins


def test_packing_leaves_out_what_says_nothing() -> None:
    assert pack({"default": Pin(100.0004)}) == {"default": [100.0]}


@pytest.mark.parametrize(
    "packed",
    [
        None,
        [],
        "default",
        {"default": None},
        {"default": 100},
        {"default": []},
        {"default": [1, 2, {}, 4]},
        {"default": ["100"]},
        {"default": [True]},
        {"default": [None]},
        {"default": [float("inf")]},
        {"default": [float("nan")]},
        {"default": [1, "0"]},
        {"default": [1, 0, [5]]},
        {"default": [1, 0, {"a": 1.5}]},
        {"default": [1, 0, {"a": True}]},
        {"default": [1, 0, {"a": "5"}]},
        {"default": [1, 0, {7: 5}]},
        {7: [1]},
    ],
)
def test_nothing_else_is_unpacked(packed: Any) -> None:
    with pytest.raises(ValueError, match=r"pin|position|number|text|names"):
        unpack(packed)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (None, None, None),
        ({"1": 5}, None, {"1": 5}),
        (None, {"1": 5}, {"1": 5}),
        ({"1": 5}, {"1": 7}, {"1": 7}),
        ({"1": 10}, {"1": 9}, {"1": 10}),
        ({"1": 5, "2": 1}, {"1": 4, "3": 2}, {"1": 5, "2": 1, "3": 2}),
    ],
)
def test_merged_positions_include_both(one: Any, other: Any, both: Any) -> None:
    assert merge_positions(one, other) == both
    assert merge_positions(other, one) == both


def test_merged_pins_keep_the_latest_end_and_the_newest_position() -> None:
    """Of two parallel requests neither takes back what the other one promised."""
    one = {"default": Pin(100.0, 50.0, {"1": 9}), "users": Pin(7.0)}
    other = {"default": Pin(90.0, 60.0, {"1": 10})}
    merged = {"default": Pin(100.0, 60.0, {"1": 10}), "users": Pin(7.0)}
    assert merge_pins(one, other) == merge_pins(other, one) == merged
    assert merge_pins() == {}


def test_a_pin_lives_until_its_end() -> None:
    pins = {"early": Pin(10.0), "late": Pin(20.0)}
    assert live(pins, 9.9) == pins
    assert live(pins, 10.0) == {"late": Pin(20.0)}
    assert live(pins, 20.0) == {}


@pytest.mark.parametrize(("now", "waits_for"), [(49.0, None), (50.0, {"1": 9}), (99.0, {"1": 9})])
def test_a_position_does_not_free_what_is_held(now: float, waits_for: Any) -> None:
    assert Pin(100.0, 50.0, {"1": 9}).waits_for(now) == waits_for
    assert Pin(100.0).waits_for(now) is None


# Merging, as a property


def holds(pin: Pin, now: float, replayed: dict[str, int]) -> bool:
    """Return whether a replica that has this must not serve yet."""
    if now >= pin.until:
        return False
    if now < pin.held_until:
        return True
    return any(replayed.get(log, -1) < point for log, point in (pin.position or {}).items())


def test_a_merge_never_shortens_a_promise() -> None:
    drawn = random.Random(7)

    def draw() -> Pin:
        logs = drawn.sample(["a-1", "a-2", "b-1"], drawn.randrange(3))
        position = {log: drawn.randrange(4) for log in logs} or None
        return Pin(drawn.randrange(1, 6), drawn.randrange(4) if position else 0.0, position)

    for _ in range(3000):
        one, other = draw(), draw()
        merged = one.merge(other)
        for now in range(7):
            for a in range(-1, 4):
                for b in range(-1, 4):
                    replayed = {"a-1": a, "a-2": b, "b-1": drawn.randrange(-1, 4)}
                    if holds(one, now, replayed) or holds(other, now, replayed):
                        assert holds(merged, now, replayed), (one, other, now, replayed)


def test_without_a_position_a_pin_is_held_until_its_end() -> None:
    assert Pin(10.0).held_until == 10.0
    assert Pin(10.0).merge(Pin(9.0, 0.0, {"1": 5})).held_until == 10.0
