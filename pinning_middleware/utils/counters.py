"""
Counters of this process, and the observers of reads and writes.

They are incremented without a lock: with the GIL, CPython switches threads only at calls and jumps.
A ``Counter`` would lose events, since it calls a Python function for a new key.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final, NamedTuple


class Read(NamedTuple):
    """
    A completed read.

    ``alias``: the alias that was chosen, even if it is a test mirror; ``served``: the alias that
    served it; ``role``: ``"primary"`` or ``"replica"``, by the chosen alias; ``reason``: a
    ``pinning_middleware.reasons.Reason``; ``server``: the server, if known; ``connection``: the
    connection that it ran on, valid only while the observer is called.
    """

    pool: str
    alias: str
    served: str
    role: str
    reason: str
    sql: str
    server: Any
    connection: Any


# Called with each read, in the thread that ran it.
observers: list[Callable[[Read], None]] = []

# Called with the alias and the text of each write on a primary, before it runs.
write_observers: list[Callable[[str, str], None]] = []

# By the pool's primary, the alias that served the read, its server (None: unknown), and the reason.
reads: defaultdict[tuple[str, str, Any, str], int] = defaultdict(int)
# By event of a pin: set, inherited, rejected; lost, if the cache did not accept it.
pin_events: defaultdict[str, int] = defaultdict(int)
# By the reason that a token was ignored for.
rejected_tokens: defaultdict[str, int] = defaultdict(int)
# By the pool's primary and the reason; by the pool's primary, the alias that failed and the one
# that served.
fallbacks: defaultdict[tuple[str, str], int] = defaultdict(int)
retries: defaultdict[tuple[str, str, str], int] = defaultdict(int)
# Reads that every standby refuses for being one, by the pool's primary and the name of the table,
# the statement or the role.
refusals: defaultdict[tuple[str, str], int] = defaultdict(int)
# Views that ended in 404 on a replica, by what the primary answered (found, missing), or because
# the limit was reached (refused).
retries_404: defaultdict[str, int] = defaultdict(int)
# Tasks that found no replica which had caught up, and were requeued, or in the end ran on
# the primary (primary).
task_retries: defaultdict[str, int] = defaultdict(int)
# Reads of a dry run that would have missed a write of their own client without pins, by the pool's
# primary.
missed_writes: defaultdict[str, int] = defaultdict(int)
# Waits for replicas to catch up, by the pool's primary: their number (count), how many ended with a
# replica (reached), and their total time (seconds).
waits: defaultdict[tuple[str, str], float] = defaultdict(int)


# Maximum number of names that are counted one by one. That of a statement is its text.
MAX_REFUSALS: Final = 256


def count_refusal(pool: str, name: str) -> None:
    """Count a read that went to the primary because no standby can serve it."""
    is_new = (pool, name) not in refusals
    refusals[pool, "others" if is_new and len(refusals) >= MAX_REFUSALS else name] += 1


def _clear() -> None:
    for counted in (
        *(reads, pin_events, rejected_tokens, fallbacks, retries, refusals),
        *(retries_404, task_retries, missed_writes, waits),
    ):
        counted.clear()


os.register_at_fork(after_in_child=_clear)
