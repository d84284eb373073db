from __future__ import annotations

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
def test_a_round_is_as_even_as_the_weights_allow(
    weights: dict[str, int], turns: tuple[str, ...]
) -> None:
    assert spread(weights) == turns


def test_turns_go_round() -> None:
    rotation = Rotation({"a": 1, "b": 1, "c": 1})
    turns = [rotation.turn() for _ in range(6)]
    assert set(turns[:3]) == {"a", "b", "c"}
    assert turns[:3] == turns[3:]


def test_weights_are_kept_over_many_turns() -> None:
    rotation = Rotation({"a": 3, "b": 1})
    assert Counter(rotation.turn() for _ in range(400)) == {"a": 300, "b": 100}


def test_first_turn_is_drawn() -> None:
    """Many processes that start together do not all begin with the same replica."""
    assert {Rotation({"a": 1, "b": 1, "c": 1}).turn() for _ in range(200)} == {"a", "b", "c"}


def test_nobody_left() -> None:
    rotation = Rotation({})
    assert not rotation
    assert rotation.turn() is None
    assert rotation.order() == ()


def test_leaving_out_and_taking_back() -> None:
    rotation = Rotation({"a": 1, "b": 2, "c": 1})
    rotation.leave_out({"b"})
    assert {rotation.turn() for _ in range(4)} == {"a", "c"}
    rotation.leave_out({"a", "b", "c"})
    assert not rotation
    assert rotation.turn() is None
    rotation.leave_out(())
    assert Counter(rotation.turn() for _ in range(8)) == {"a": 2, "b": 4, "c": 2}


def test_order_has_everybody_once() -> None:
    """Whoever tries one replica after the other asks none of them twice."""
    rotation = Rotation({"a": 5, "b": 1, "c": 1})
    for _ in range(20):
        assert sorted(rotation.order()) == ["a", "b", "c"]


def test_order_begins_with_the_next_turn() -> None:
    rotation = Rotation({"a": 1, "b": 1})
    first, second = rotation.order(), rotation.order()
    assert first == second[::-1]


def test_threads_share_the_turns() -> None:
    """No turn is given twice or lost, although there is no lock."""
    rotation = Rotation({"a": 1, "b": 1})
    turns: list[str | None] = []

    def take() -> None:
        turns.extend([rotation.turn() for _ in range(500)])

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(turns) == {"a": 2000, "b": 2000}
