"""
What this process did, counted where it happens; and who wants to see each read.

Additions to a dict need no lock: with the interpreter's own, no thread comes in between.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = [
    "Read",
    "fallbacks",
    "observers",
    "pins",
    "reads",
    "rejected",
    "reruns",
    "write_observers",
]


class Read(NamedTuple):
    """
    One read that has run. ``alias``: where the decider meant it to go, a test mirror's included;
    ``served``: the alias that answered; ``role``: ``"primary"`` or ``"replica"``, what was meant;
    ``reason``: a word of ``pinning_middleware.reasons``, or ``"explicit"``; ``connection``: what
    it ran on, which is good only while the observer is called.
    """

    pool: str
    alias: str
    served: str
    role: str
    reason: str
    sql: str
    server: Any
    connection: Any


# Called with each read, in the thread that made it. Nobody is asked where it is empty.
observers: list[Callable[[Read], None]] = []

# Called with the alias and the text of each write on a primary that counts, before it runs.
write_observers: list[Callable[[str, str], None]] = []

# By the pool's primary, the alias that answered, its server (None: not known), and the reason.
reads: defaultdict[tuple[str, str, Any, str], int] = defaultdict(int)
# By what happened to a pin: set, carried, rejected.
pins: Counter[str] = Counter()
# By the reason a token was ignored.
rejected: Counter[str] = Counter()
# By the pool's primary and the reason; and by the pool's primary, who failed and who served.
fallbacks: Counter[tuple[str, str]] = Counter()
reruns: Counter[tuple[str, str, str]] = Counter()


def _begin_anew() -> None:
    for counted in (reads, pins, rejected, fallbacks, reruns):
        counted.clear()


os.register_at_fork(after_in_child=_begin_anew)
