"""Groups of replicas: each has a rotation of its own, as have the replicas without groups."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pinning_middleware.pool_specs import PoolSpec
from pinning_middleware.routing.rotation import Rotation


class Rotations:
    """
    The rotations of a pool.

    ``default`` has the replicas without groups, ``by_group`` those of each group; ``weights`` are
    those of all replicas.
    """

    def __init__(self, spec: PoolSpec) -> None:
        self.weights = spec.weights
        self.default = _make(spec, None)
        self.by_group = {group: _make(spec, group) for group in spec.groups}
        self._all = (self.default, *self.by_group.values())

    @property
    def any_exhausted(self) -> bool:
        """Whether all replicas of a rotation are out of it."""
        return any(not rotation and bool(rotation.weights) for rotation in self._all)

    def randomise(self) -> None:
        """Start each at a random place."""
        for rotation in self._all:
            rotation.randomise()

    def exclude(self, names: Collection[str]) -> None:
        """Exclude these names; an empty collection readmits all."""
        for rotation in self._all:
            rotation.exclude(names)

    def of(self, group: str | None) -> Rotation:
        """Return the rotation of a group, the default one if the pool does not have the group."""
        return self.default if group is None else self.by_group.get(group, self.default)

    def alternatives(
        self, group: str | None, key: str | None, *, fallback: bool = True
    ) -> Iterator[str]:
        """
        Yield the replicas that may serve a read in place of another: those of its group, and then
        those without groups. While they fail, others of a higher tier may follow.
        """
        for rotation in dict.fromkeys((self.of(group), self.default)):
            tried: set[str] = set()
            while left := [a for a in rotation.order(key, fallback=fallback) if a not in tried]:
                tried.update(left)
                yield from left


def _make(spec: PoolSpec, group: str | None) -> Rotation:
    weights = spec.weights_of(group)
    return Rotation(weights, {alias: spec.placement(alias).tier for alias in weights})
