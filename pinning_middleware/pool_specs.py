"""
The pools of PINNING_REPLICAS: their replicas, weights, tiers and groups; and those of
PINNING_DRY_RUN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from django.db import DEFAULT_DB_ALIAS

from pinning_middleware.pins import PoolKey

_EXAMPLE: Final = '{"weight": 1, "tier": 2, "groups": ["reports"]}'


class Placement(NamedTuple):
    """
    When a replica is used. ``tier``: only while every replica of the lower tiers is out of
    rotation. ``groups``: only reads of these groups; all other reads if there are none.
    """

    tier: int = 1
    groups: tuple[str, ...] = ()


class PoolSpec(NamedTuple):
    """
    A pool as described by the settings; ``key`` identifies it in a scope.

    ``placements`` has the replicas with a tier or groups; for all others the defaults apply.
    ``assumed_lag`` is set for a dry run, which has no replicas (seconds).
    """

    key: PoolKey
    weights: Mapping[str, int]
    placements: Mapping[str, Placement] = {}
    assumed_lag: float | None = None

    def placement(self, alias: str) -> Placement:
        """Return the tier and the groups of a replica."""
        return self.placements.get(alias, Placement())

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups of replicas, in the order of the settings."""
        return tuple(dict.fromkeys(g for each in self.placements.values() for g in each.groups))

    def weights_of(self, group: str | None) -> dict[str, int]:
        """Return the weights of the replicas of a group; None: of those without groups."""
        return {
            alias: weight
            for alias, weight in self.weights.items()
            if group in (self.placement(alias).groups or (None,))
        }


def parse_pools(value: object) -> tuple[PoolSpec, ...]:
    """
    Return the pools of PINNING_REPLICAS, also those without replicas.

    Raise ValueError, with a message that completes "PINNING_REPLICAS …", for an invalid value.
    """
    if isinstance(value, (list, tuple)):
        value = {DEFAULT_DB_ALIAS: value} if value else {}
    if not isinstance(value, Mapping):
        raise ValueError("should be a list of aliases, or map primaries' aliases to such lists")
    return tuple(_parse_pool(primary, replicas) for primary, replicas in value.items())


def parse_dry_run(value: object) -> dict[str, float]:
    """
    Return PINNING_DRY_RUN as primary's alias → assumed lag (seconds).

    Raise ValueError, with a message that completes "PINNING_DRY_RUN …", for an invalid value.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("should be None, or map primaries' aliases to seconds")
    for primary, lag in value.items():
        if not isinstance(primary, str):
            raise ValueError("should contain aliases as strings")
        is_number = isinstance(lag, (int, float)) and not isinstance(lag, bool)
        if not is_number or not math.isfinite(lag) or lag < 0:
            raise ValueError(f"should have a number of seconds, 0 or more, for {primary!r}")
    return {primary: float(lag) for primary, lag in value.items()}


def _parse_pool(primary: Any, replicas: Any) -> PoolSpec:
    if not isinstance(primary, str):
        raise ValueError("should contain aliases as strings")
    if isinstance(replicas, (list, tuple)):
        if not all(isinstance(alias, str) for alias in replicas):
            raise ValueError("should contain aliases as strings")
        if len(set(replicas)) != len(replicas):
            raise ValueError(f"should list each replica of {primary!r} once, or map it to a weight")
        replicas = dict.fromkeys(replicas, 1)
    if not isinstance(replicas, Mapping):
        raise ValueError(f"should have a list or {{alias: weight}} for {primary!r}")
    weights: dict[str, int] = {}
    placements: dict[str, Placement] = {}
    for alias, options in replicas.items():
        if not isinstance(alias, str):
            raise ValueError("should contain aliases as strings")
        if isinstance(options, Mapping):
            placement = _parse_placement(alias, options)
            if placement != Placement():
                placements[alias] = placement
            options = options.get("weight", 1)
        if not _is_integer(options, 0):
            raise ValueError(
                f"should have an integer of 0 or more as the weight of {alias!r}, or a dictionary "
                f"such as {_EXAMPLE}"
            )
        weights[alias] = options
    return PoolSpec(PoolKey(primary), weights, placements)


def _parse_placement(alias: str, options: Mapping[Any, Any]) -> Placement:
    known = ("weight", "tier", "groups")
    if unknown := [name for name in options if name not in known]:
        raise ValueError(
            f"should have no {_listed(unknown)} for {alias!r}, only {_listed(known)}, such as "
            f"{_EXAMPLE}"
        )
    tier, groups = options.get("tier", 1), options.get("groups", ())
    if not _is_integer(tier, 1):
        raise ValueError(f"should have an integer of 1 or more as the tier of {alias!r}")
    is_list = isinstance(groups, (list, tuple, set, frozenset))
    if not is_list or not all(isinstance(group, str) and group for group in groups):
        raise ValueError(f'should have a list such as ["reports"] as the groups of {alias!r}')
    return Placement(tier, tuple(dict.fromkeys(groups)))


def _is_integer(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names))
