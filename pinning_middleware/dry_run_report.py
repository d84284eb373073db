"""What PINNING_DRY_RUN has counted, and what that means for the primary's load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from django.utils.translation import ngettext

from pinning_middleware.conf import conf
from pinning_middleware.reasons import Reason
from pinning_middleware.stats import format_duration
from pinning_middleware.stores import dry_run_counts
from pinning_middleware.stores.dry_run_counts import MISSED_WRITE

TO_REPLICAS: Final = (Reason.ROUND_ROBIN, Reason.CAUGHT_UP, Reason.USE_REPLICA)
WAITING: Final = (Reason.PINNED, Reason.NOT_CAUGHT_UP)


class DryRun(NamedTuple):
    """
    The reads of one pool in a dry run.

    - ``pool``: alias of the primary.
    - ``assumed_lag``: the lag of the assumed replica (seconds).
    - ``reasons``: reason → number of reads.
    - ``missed_writes``: reads that only a pin would keep from a replica without the client's write.
    """

    pool: str
    assumed_lag: float
    reasons: Mapping[str, int]
    missed_writes: int

    @property
    def reads(self) -> int:
        """All reads."""
        return sum(self.reasons.values())

    @property
    def to_replicas(self) -> int:
        """Reads that could go to replicas."""
        return sum(self.reasons.get(reason, 0) for reason in TO_REPLICAS)

    @property
    def waiting(self) -> int:
        """Reads that would stay on the primary until a replica has caught up or a pin ends."""
        return sum(self.reasons.get(reason, 0) for reason in WAITING)

    @property
    def on_primary(self) -> int:
        """Reads that would stay on the primary for another reason."""
        return self.reads - self.to_replicas - self.waiting

    @property
    def summary(self) -> list[str]:
        """Sentences for people."""
        begin = f"Dry run of {self.pool}: a replica that lags {format_duration(self.assumed_lag)}."
        if not conf.enabled:
            return [begin, "PINNING_ENABLED is False, so nothing is decided."]
        if not self.reads:
            return [begin, "No read has been counted."]
        reads = ngettext("Of %d read", "Of %d reads", self.reads) % self.reads
        return [
            begin,
            f"{reads}, {self._percent(self.to_replicas)} could go to replicas, "
            f"{self._percent(self.waiting)} would stay on the primary until a replica has caught "
            f"up with a write, and {self._percent(self.on_primary)} would stay there anyway.",
            f"Without pins, {self.missed_writes} of them ({self._percent(self.missed_writes)}) "
            "would have missed what their own client had written.",
            f"With replicas, the primary would serve {self._percent(self.reads - self.to_replicas)}"
            " of the reads that it serves now, and all writes.",
        ]

    def _percent(self, number: int) -> str:
        return f"{100 * number / self.reads:.1f} %"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as values for JSON."""
        names = ("reads", "to_replicas", "waiting", "on_primary")
        return {
            **self._asdict(),
            "reasons": dict(self.reasons),
            **{name: getattr(self, name) for name in names},
            "summary": " ".join(self.summary),
        }


def of_this_process() -> list[DryRun]:
    """Return what this process has counted, for each pool."""
    return [_made(primary, dry_run_counts.of_this_process(primary)) for primary in _primaries()]


def of_all_processes() -> list[DryRun]:
    """
    Return what all processes have counted, for each pool. Raise what the cache raises, in which
    they add it up.
    """
    return [_made(primary, dry_run_counts.of_all_processes(primary)) for primary in _primaries()]


def _primaries() -> list[str]:
    return [spec.key.primary for spec in conf.pools if spec.assumed_lag is not None]


def _made(primary: str, counts: Mapping[str, int]) -> DryRun:
    reasons = {name: number for name, number in counts.items() if name != MISSED_WRITE}
    most_first = dict(sorted(reasons.items(), key=lambda each: (-each[1], each[0])))
    return DryRun(primary, conf.dry_run[primary], most_first, counts.get(MISSED_WRITE, 0))
