"""Whose turn it is. Pure: knows names and weights, nothing of databases."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Mapping
from math import gcd

__all__ = ["Rotation", "spread"]


def spread(weights: Mapping[str, int]) -> tuple[str, ...]:
    """
    Return one round of turns in which each name occurs as often as its weight says, as evenly
    spread as possible (smooth weighted round robin, as nginx does it). One of weight 0 has none.

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
    Endless turns over weighted names. The first turn is drawn at random, so that many processes
    that start together do not all begin with the same name.

    Safe between threads without a lock: the counter advances atomically, and the round is a
    tuple that is only ever replaced as a whole.
    """

    __slots__ = ("_count", "_round", "weights")

    def __init__(self, weights: Mapping[str, int]) -> None:
        self.weights = dict(weights)
        self._round = spread(self.weights)
        self.draw()

    def __bool__(self) -> bool:
        return bool(self._round)

    def draw(self) -> None:
        """Begin anywhere."""
        start = random.randrange(max(len(self._round), 1))
        self._count: Iterator[int] = itertools.count(start)

    def leave_out(self, names: Collection[str]) -> None:
        """Go on without these names; an empty collection takes everybody back."""
        self._round = spread({n: w for n, w in self.weights.items() if n not in names})

    def turn(self) -> str | None:
        """Return the name whose turn it is, ``None`` where nobody is left."""
        names = self._round
        return names[next(self._count) % len(names)] if names else None

    def order(self) -> tuple[str, ...]:
        """Return every name that is in, each once, beginning with the one whose turn it is."""
        names = self._round
        if not names:
            return ()
        start = next(self._count) % len(names)
        return tuple(dict.fromkeys(names[start:] + names[:start]))
