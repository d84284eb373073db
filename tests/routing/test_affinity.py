from __future__ import annotations

from collections import Counter

import pytest

from pinning_middleware.routing.affinity import ranking
from pinning_middleware.routing.rotation import Rotation

USERS = [f"user:{number}" for number in range(10_000)]


@pytest.mark.parametrize(
    "weights",
    [{"a": 1, "b": 1}, {"a": 1, "b": 1, "c": 1}, {"a": 3, "b": 1}, {"a": 5, "b": 3, "c": 2}],
)
def test_users_are_shared_out_by_weight(weights: dict[str, int]) -> None:
    """Within two per cent of all users."""
    users = Counter(ranking(user, tuple(weights.items()))[0] for user in USERS)
    for name, weight in weights.items():
        assert users[name] / len(USERS) == pytest.approx(weight / sum(weights.values()), abs=0.02)


def test_leaving_name_moves_only_its_own_users() -> None:
    rotation = Rotation({"a": 3, "b": 1, "c": 2})
    before = {user: rotation.next(key=user) for user in USERS}
    second = {user: rotation.order(user)[1] for user in USERS}
    rotation.exclude({"b"})
    for user in USERS:
        expected = second[user] if before[user] == "b" else before[user]
        assert rotation.next(key=user) == expected
    rotation.exclude(())
    assert {user: rotation.next(key=user) for user in USERS} == before


def test_ranking_is_the_same_in_every_process() -> None:
    weights = (("a", 1), ("b", 1), ("c", 1))
    assert [ranking(str(user), weights)[0] for user in range(10)] == list("accbacbabb")


def test_weight_0_and_any_text_are_possible() -> None:
    assert ranking("\udcff é\0", (("a", 0), ("b", 1))) == ("b",)
    assert ranking("user", ()) == ()
