from __future__ import annotations

import random
import threading
from collections import Counter

import pytest

from pinning_middleware.routing.rotation import Rotation, spread


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ({}, ()),
        ({"a": 1}, ("a",)),
        ({"a": 7}, ("a",)),
        ({"a": 1, "b": 1}, ("a", "b")),
        ({"a": 2, "b": 1}, ("a", "b", "a")),
        ({"a": 20, "b": 10}, ("a", "b", "a")),
        ({"a": 3, "b": 1}, ("a", "a", "b", "a")),
        ({"a": 5, "b": 1, "c": 1}, ("a", "a", "b", "a", "c", "a", "a")),
    ],
)
def test_round_is_as_even_as_the_weights_allow(
    weights: dict[str, int], turns: tuple[str, ...]
) -> None:
    assert spread(weights) == turns


def test_next_is_round_robin() -> None:
    rotation = Rotation({"a": 1, "b": 1, "c": 1})
    turns = [rotation.next() for _ in range(6)]
    assert set(turns[:3]) == {"a", "b", "c"}
    assert turns[:3] == turns[3:]


def test_weights_apply_over_many_rounds() -> None:
    rotation = Rotation({"a": 3, "b": 1})
    assert Counter(rotation.next() for _ in range(400)) == {"a": 300, "b": 100}


def test_first_position_is_randomised() -> None:
    """Processes that start at the same time begin with different replicas."""
    assert {Rotation({"a": 1, "b": 1, "c": 1}).next() for _ in range(200)} == {"a", "b", "c"}


def test_next_returns_none_if_all_are_excluded() -> None:
    rotation = Rotation({})
    assert not rotation
    assert rotation.next() is None
    assert rotation.order() == ()


def test_excluded_replica_is_skipped_until_it_is_included_again() -> None:
    rotation = Rotation({"a": 1, "b": 2, "c": 1})
    rotation.exclude({"b"})
    assert {rotation.next() for _ in range(4)} == {"a", "c"}
    rotation.exclude({"a", "b", "c"})
    assert not rotation
    assert rotation.next() is None
    rotation.exclude(())
    assert Counter(rotation.next() for _ in range(8)) == {"a": 2, "b": 4, "c": 2}


def test_order_contains_each_replica_once() -> None:
    """A caller that tries the replicas in order tries each of them once."""
    rotation = Rotation({"a": 5, "b": 1, "c": 1})
    for _ in range(20):
        assert sorted(rotation.order()) == ["a", "b", "c"]


def test_order_begins_with_the_next_replica() -> None:
    rotation = Rotation({"a": 1, "b": 1})
    first, second = rotation.order(), rotation.order()
    assert first == second[::-1]


def test_threads_share_one_rotation() -> None:
    """No position is returned twice or skipped, although there is no lock."""
    rotation = Rotation({"a": 1, "b": 1})
    turns: list[str | None] = []

    def take() -> None:
        turns.extend([rotation.next() for _ in range(500)])

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(turns) == {"a": 2000, "b": 2000}


TIERS = {"far": 2, "last": 9}


def test_higher_tier_serves_only_while_all_of_the_lower_ones_are_excluded() -> None:
    rotation = Rotation({"near1": 3, "near2": 1, "far": 1, "last": 1}, TIERS)
    assert Counter(rotation.next() for _ in range(8)) == {"near1": 6, "near2": 2}
    rotation.exclude({"near1"})
    assert rotation.order() == ("near2",)
    rotation.exclude({"near1", "near2"})
    assert rotation.order() == ("far",)
    rotation.exclude({"near1", "near2", "far"})
    assert rotation.order() == ("last",)
    rotation.exclude({"far"})
    assert set(rotation.order()) == {"near1", "near2"}


def test_order_without_fallback_has_the_lowest_tier_only() -> None:
    rotation = Rotation({"near": 1, "far": 1, "drained": 0}, {**TIERS, "drained": 1})
    assert rotation.order(fallback=False) == ("near",)
    rotation.exclude({"near"})
    assert rotation.order(fallback=False) == ()
    assert rotation.order("user", fallback=False) == ()
    assert rotation.is_fallback("far")
    assert not rotation.is_fallback("near")


def test_tier_of_drained_names_is_skipped() -> None:
    rotation = Rotation({"near": 0, "far": 1}, TIERS)
    assert rotation.order(fallback=False) == ("far",)


# Every place of a round

WEIGHTS = [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 3, "b": 2, "c": 1}, {"a": 4, "b": 1, "c": 1}]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_next_skips_the_name_before_unless_its_weight_repeats_it(
    monkeypatch: pytest.MonkeyPatch, weights: dict[str, int]
) -> None:
    names = spread(weights)
    for place, name in enumerate(names):
        monkeypatch.setattr(random, "randrange", lambda stop, place=place: place)
        following = name if names[place - 1] == name else names[(place + 1) % len(names)]
        assert Rotation(weights).next(after=name) == following


@pytest.mark.parametrize("weights", WEIGHTS)
def test_order_begins_with_the_next_name_each_time(weights: dict[str, int]) -> None:
    rotation, names = Rotation(weights), spread(weights)
    firsts = [rotation.order()[0] for _ in range(3 * len(names))]
    start = next(n for n in range(len(names)) if (names[n:] + names[:n]) * 3 == tuple(firsts))
    assert 0 <= start < len(names)
