"""Weighted round robin in tiers. No I/O: names and weights only."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Mapping
from math import gcd

from pinning_middleware.routing.affinity import ranking


def spread(weights: Mapping[str, int]) -> tuple[str, ...]:
    """
    Return one round, in which each name occurs in proportion to its weight, as evenly spread as
    possible (smooth weighted round robin, as in nginx). A name of weight 0 does not occur.

    >>> spread({"big": 2, "small": 1})
    ('big', 'small', 'big')
    """
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        return ()
    divisor = gcd(*weights.values())
    shares = {name: weight // divisor for name, weight in weights.items()}
    total = sum(shares.values())
    credit = dict.fromkeys(shares, 0)
    turns = []
    for _ in range(total):
        for name, share in shares.items():
            credit[name] += share
        name = max(credit, key=credit.__getitem__)
        credit[name] -= total
        turns.append(name)
    return tuple(turns)


class Rotation:
    """
    Endless round robin over weighted names. The start is random, so that many processes that start
    together do not all begin with the same name.

    Only those of the lowest of the ``tiers`` (1 if not given) that is left take part: ``names``.
    With the ``key`` of a user, the order is that of ``affinity.ranking()``. Names of weight 0 are
    left out.

    Thread-safe without a lock: the counter advances atomically, and the round is a tuple that is
    only ever replaced as a whole.
    """

    __slots__ = ("_count", "_first_tier", "_round", "_tiers", "_weights", "names", "weights")

    def __init__(self, weights: Mapping[str, int], tiers: Mapping[str, int] | None = None) -> None:
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self._tiers = dict(tiers or {})
        self.exclude(())
        self._first_tier = self.names
        self.randomise()

    def is_fallback(self, name: str) -> bool:
        """Return whether a name is of a tier above the lowest."""
        return name not in self._first_tier

    def __bool__(self) -> bool:
        return bool(self._round)

    def randomise(self) -> None:
        """Start at a random place."""
        start = random.randrange(max(len(self._round), 1))
        self._count: Iterator[int] = itertools.count(start)

    def exclude(self, names: Collection[str]) -> None:
        """Exclude these names; an empty collection readmits all."""
        left = {name: w for name, w in self.weights.items() if name not in names}
        lowest = min((self._tiers.get(name, 1) for name in left), default=1)
        left = {name: w for name, w in left.items() if self._tiers.get(name, 1) == lowest}
        self._round, self.names, self._weights = spread(left), frozenset(left), (*left.items(),)

    def next(self, after: str | None = None, key: str | None = None) -> str | None:
        """
        Return the next name, None if none is left.

        ``after`` is the name that the caller had before. Many callers that share the rotation could
        each be given the same name again and again; that one is skipped, unless its weight repeats
        it.
        """
        if key is not None:
            return next(iter(ranking(key, self._weights)), None)
        names = self._round
        if not names:
            return None
        place = next(self._count) % len(names)
        if names[place] == after != names[place - 1]:
            place = next(self._count) % len(names)
        return names[place]

    def order(self, key: str | None = None, *, fallback: bool = True) -> tuple[str, ...]:
        """
        Return every name in the rotation once, beginning with the next one.

        Unless ``fallback`` is true, only names of the lowest tier.
        """
        if not fallback and self.names.isdisjoint(self._first_tier):
            return ()
        if key is not None:
            return ranking(key, self._weights)
        names = self._round
        if not names:
            return ()
        start = next(self._count) % len(names)
        return tuple(dict.fromkeys(names[start:] + names[:start]))
