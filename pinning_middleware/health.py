"""
Which replica is usable, how far it is known to be, and when to look again.

Flags and times only: the lock is never held while a database is asked, or while a receiver of a
signal runs. Times are of the monotonic clock.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time

from .conf import conf
from .pins import Position, merge_positions
from .selection import Rotation
from .signals import replica_left_out, replica_taken_back

__all__ = ["LOOK_EVERY", "Health", "Replica"]

logger = logging.getLogger("pinning_middleware")

# Seconds between two looks of one process at one replica.
LOOK_EVERY = 2.0
# Seconds between two tries while every replica is out.
LAST_RESORT_EVERY = 0.25
# Seconds for which nobody else tries a replica that somebody tries.
CLAIM_LASTS = 3.0


class Replica:
    """What this process knows of one replica."""

    __slots__ = (
        "_behind_since",
        "_caught_up",
        "_jitter",
        "alias",
        "claimed",
        "lag",
        "looked",
        "measured",
        "out",
        "position",
        "prober",
        "retry_at",
    )

    def __init__(self, alias: str) -> None:
        self.alias = alias
        # Why it is out of the rotation ("connect", "lag", "role"), empty: it is in.
        self.out = ""
        self.retry_at = 0.0
        # The thread that tries it again, while it is out.
        self.prober = 0
        self.claimed = 0.0
        # Seconds behind the primary, None: not known; and when that was measured, which not
        # every look does.
        self.lag: float | None = None
        self.measured = -math.inf
        self.looked = -math.inf
        # What it is known to have replayed. A process sees a replica go forward only.
        self.position: Position = {}
        self._behind_since: float | None = None
        self._caught_up = -math.inf
        # Drawn once, so that processes that saw the same failure do not come back together.
        self._jitter = random.uniform(1.0, 1.25)

    def retry_in(self, seconds: float) -> None:
        self.retry_at = time.monotonic() + seconds * self._jitter

    def claim(self, now: float) -> None:
        """Let this thread, and no other, try it again."""
        self.retry_in(conf.retry_after)
        self.prober, self.claimed = threading.get_ident(), now
        # What it is now has to be seen now.
        self.looked = -math.inf

    def is_claimed(self, now: float) -> bool:
        # A scope that was given a replica to try may end without a read.
        return bool(self.prober) and now - self.claimed < CLAIM_LASTS

    def saw(self, position: Position) -> None:
        self.position = merge_positions(self.position, position) or {}

    def lags(self, is_behind: bool, told: float | None) -> float:
        """
        Return for how long it has been behind at most, in seconds. What it tells of itself counts
        from its last transaction, however long nobody wrote before the one it lacks; so do not
        go back before a look that found it caught up.
        """
        now = time.monotonic()
        if not is_behind:
            self._behind_since, self._caught_up = None, now
            return 0.0
        if self._behind_since is None:
            self._behind_since = now
        seen = now - self._behind_since
        return seen if told is None else max(seen, min(told, now - self._caught_up))


class Health:
    """The replicas of one pool, and their turns."""

    def __init__(self, primary: str, rotation: Rotation) -> None:
        self._primary = primary
        self._rotation = rotation
        self._lock = threading.Lock()
        self.replicas = {alias: Replica(alias) for alias in rotation.weights}
        # Those out of the rotation; replaced as a whole.
        self.out: frozenset[str] = frozenset()
        self._hurry_at = 0.0
        # The primary could not be reached; until then nobody tries.
        self.primary_retry_at = 0.0

    def leave_out(self, alias: str, reason: str, seconds: float | None = None) -> None:
        """Take a replica out of the rotation, for ``PINNING_RETRY_AFTER`` or so many seconds."""
        replica = self.replicas[alias]
        seconds = conf.retry_after if seconds is None else seconds
        with self._lock:
            replica.retry_in(seconds)
            is_news = replica.out != reason
            self._set_out(replica, reason)
        if is_news:
            logger.warning("%s is left out of the rotation (%s).", alias, reason)
            replica_left_out.send(self._primary, replica=alias, reason=reason, seconds=seconds)

    def take_back(self, alias: str) -> None:
        """Put a replica into the rotation again, if it was out."""
        replica = self.replicas[alias]
        if not replica.out:
            return
        with self._lock:
            is_news = bool(replica.out)
            self._set_out(replica, "")
        if is_news:
            logger.info("%s is back in the rotation.", alias)
            replica_taken_back.send(self._primary, replica=alias)

    def forget(self, alias: str) -> None:
        """
        Forget how far a replica was: behind a new connection may be a server that was restarted
        and is not yet as far again, or another one.
        """
        self.replicas[alias].position = {}

    def suspect(self, alias: str) -> None:
        """Forget all of a replica that was lost, so that the next read looks at it."""
        self.forget(alias)
        self.replicas[alias].looked = -math.inf

    def claim_retry(self) -> str | None:
        """
        Return a replica that is out and due to be tried again. Only one caller gets it: others
        go on without it until that one knows more.
        """
        now = time.monotonic()
        with self._lock:
            free = [r for r in map(self.replicas.get, self.out) if r and not r.is_claimed(now)]
            if not free:
                return None
            replica = min(free, key=lambda replica: replica.retry_at)
            # While nobody is left, the primary has the reads of all: look more often.
            hurries = len(self.out) == len(self.replicas) and self._hurry_at <= now
            if replica.retry_at > now and not hurries:
                return None
            self._hurry_at = now + LAST_RESORT_EVERY
            replica.claim(now)
            return replica.alias

    def claim_look(self, alias: str, every: float = LOOK_EVERY) -> bool:
        """Return whether it is time for this caller, and no other, to look at a replica."""
        replica = self.replicas[alias]
        now = time.monotonic()
        if now - replica.looked < every:
            return False
        with self._lock:
            is_due = now - replica.looked >= every
            if is_due:
                replica.looked = now
        return is_due

    def claim_measure(self, alias: str, every: float) -> bool:
        """Return whether it is time for this caller, and no other, to measure a replica's lag."""
        replica = self.replicas[alias]
        now = time.monotonic()
        with self._lock:
            is_due = now - replica.measured >= every
            if is_due:
                replica.measured = now
        return is_due

    def may_connect(self, alias: str) -> bool:
        """Return whether this thread may try to connect: to one that is out only its prober may."""
        return alias not in self.out or self.replicas[alias].prober == threading.get_ident()

    def freshest_of_lagging(self) -> str | None:
        """Return the replica that lags least of those that are out for nothing but lag."""
        lagging = [replica for replica in self.replicas.values() if replica.out == "lag"]
        return min(lagging, key=lambda replica: replica.lag or 0.0).alias if lagging else None

    def _set_out(self, replica: Replica, reason: str) -> None:
        replica.out = reason
        replica.prober = 0
        self.out = self.out | {replica.alias} if reason else self.out - {replica.alias}
        self._rotation.leave_out(self.out)
