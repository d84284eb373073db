from __future__ import annotations

from pinning_middleware.pool_specs import parse_pools
from pinning_middleware.routing.affinity import ranking
from pinning_middleware.routing.groups import Rotations


def rotations(**replicas: object) -> Rotations:
    (spec,) = parse_pools({"default": replicas})
    return Rotations(spec)


def test_alternatives_of_a_group_are_followed_by_those_without_groups() -> None:
    found = rotations(near=1, a={"groups": ["g"]}, b={"groups": ["g", "h"]}, c={"groups": ["h"]})
    order = list(found.alternatives("g", None))
    assert (set(order[:2]), order[2:]) == ({"a", "b"}, ["near"])
    assert list(found.alternatives(None, None)) == ["near"]
    assert list(found.alternatives("unknown", None)) == ["near"]


def test_alternatives_reach_a_higher_tier_if_the_lower_one_fails_meanwhile() -> None:
    found = rotations(near1=1, near2=1, far={"tier": 2})
    tried = []
    for name in found.alternatives(None, None):
        tried.append(name)
        found.exclude(set(tried))
    assert (set(tried[:2]), tried[2:]) == ({"near1", "near2"}, ["far"])
    assert list(found.alternatives(None, None, fallback=False)) == []


def test_alternatives_of_a_user_are_in_the_order_of_the_hash() -> None:
    weights = (("a", 1), ("b", 1), ("c", 1), ("d", 1))
    found = rotations(**dict(weights))
    for user in map(str, range(20)):
        assert tuple(found.alternatives(None, user)) == ranking(user, weights)


def test_only_a_rotation_with_weights_is_exhausted() -> None:
    found = rotations(a=1, b={"weight": 0, "groups": ["drained"]}, c={"groups": ["g"]})
    assert not found.any_exhausted
    found.exclude({"c"})
    assert found.any_exhausted
