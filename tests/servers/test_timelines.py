"""Hidden timelines: which reports of a replica the primary's samples resolve."""

from __future__ import annotations

import pytest

from pinning_middleware.pins import Position
from pinning_middleware.servers.timelines import (
    HiddenTimeline,
    PrimarySample,
    is_unresolved,
    log_name,
    may_be,
    timeline_of,
)

HIDDEN = "ff-"


class Timeline:
    """A hidden timeline, with a clock that moves on at every probe."""

    def __init__(self, checkpoint_timeline: str | None = None) -> None:
        self.hidden = HiddenTimeline()
        self.checkpoint_timeline = checkpoint_timeline
        self.samples: list[PrimarySample] = []
        self._now = 0.0

    def replica(self, point: int) -> None:
        sent_at, received_at = self._probe()
        self.hidden.record({HIDDEN: point}, sent_at, received_at, True)

    def primary(self, end: int, timeline: int = 1) -> None:
        self.samples.append(PrimarySample(*self._probe(), Position({f"ff-{timeline}": end})))

    def bracket(self, before: int, point: int, after: int, timeline: int = 1) -> dict[str, int]:
        """Probe the primary, the replica and the primary; return what is resolved then."""
        self.primary(before, timeline)
        self.replica(point)
        self.primary(after, timeline)
        return self.resolve()

    def resolve(self) -> dict[str, int]:
        return dict(self.hidden.resolve(self.samples, self.checkpoint_timeline))

    def _probe(self) -> tuple[float, float]:
        self._now += 2
        return self._now, self._now + 1


# Names of logs


def test_log_name_contains_the_timeline() -> None:
    assert log_name("ff", "12") == "ff-12"
    assert timeline_of("ff-12") == "12"
    assert not is_unresolved("ff-12")


def test_log_name_without_timeline_is_unresolved() -> None:
    assert log_name("ff", None) == "ff-"
    assert timeline_of("ff-") is None
    assert is_unresolved("ff-")


@pytest.mark.parametrize("log", ["0-1", "3e11fa47", "3e11fa47:backup", "ffx"])
def test_logs_of_other_databases_and_strategies_are_resolved(log: str) -> None:
    assert not is_unresolved(log)


def test_unresolved_log_may_be_any_timeline_of_the_same_prefix() -> None:
    assert may_be("ff-", "ff-1")
    assert may_be("ff-", "ff-12")
    assert not may_be("ff-", "ffx-1")
    assert not may_be("ff-", "fe-1")


# Resolving


def test_second_larger_bracketed_point_is_resolved() -> None:
    timeline = Timeline()
    assert timeline.bracket(10, 10, 10) == {}
    assert timeline.bracket(20, 20, 20) == {"ff-1": 20}
    assert timeline.bracket(25, 27, 30) == {"ff-1": 27}


def test_standstill_on_a_lost_timeline_is_never_resolved() -> None:
    """The new primary's log grows past a replica that has replayed a lost timeline further."""
    timeline = Timeline()
    for end in range(80, 130, 10):
        assert timeline.bracket(end, 100, end + 10, timeline=2) == {}


@pytest.mark.parametrize(("timeline", "resolved"), [(1, {}), (2, {"ff-2": 10}), (12, {})])
def test_first_point_is_resolved_on_the_checkpoint_timeline_only(
    timeline: int, resolved: dict[str, int]
) -> None:
    assert Timeline(checkpoint_timeline="2").bracket(10, 10, 10, timeline) == resolved


@pytest.mark.parametrize("point", [15, 35])
def test_point_outside_the_bracket_is_not_resolved(point: int) -> None:
    timeline = Timeline(checkpoint_timeline="1")
    assert timeline.bracket(20, point, 30) == {}


def test_report_without_a_later_sample_is_not_resolved() -> None:
    timeline = Timeline(checkpoint_timeline="1")
    timeline.primary(20)
    timeline.replica(20)
    assert timeline.resolve() == {}


def test_report_without_an_earlier_sample_is_not_resolved() -> None:
    timeline = Timeline(checkpoint_timeline="1")
    timeline.replica(20)
    timeline.primary(20)
    assert timeline.resolve() == {}


def test_sample_that_overlaps_the_report_does_not_bracket_it() -> None:
    """The primary's reply arrived only after the replica's query had been sent."""
    hidden = HiddenTimeline()
    hidden.record({HIDDEN: 10}, 2.0, 3.0, True)
    samples = [
        PrimarySample(1.0, 2.5, Position({"ff-1": 10})),
        PrimarySample(4.0, 5.0, Position({"ff-1": 10})),
    ]
    assert hidden.resolve(samples, "1") == {}


def test_promotion_between_the_samples_resolves_nothing() -> None:
    timeline = Timeline(checkpoint_timeline="2")
    timeline.primary(20, timeline=1)
    timeline.replica(20)
    timeline.primary(20, timeline=2)
    assert timeline.resolve() == {}


def test_report_with_a_timeline_is_not_kept_for_resolving() -> None:
    hidden = HiddenTimeline()
    hidden.record({"ff-1": 10}, 2.0, 3.0, False)
    samples = [
        PrimarySample(0.0, 1.0, Position({"ff-1": 10})),
        PrimarySample(4.0, 5.0, Position({"ff-1": 10})),
    ]
    assert hidden.resolve(samples, "1") == {}
    assert not hidden.reported_at_least({"ff-1": 10})


# The last report


@pytest.mark.parametrize(("point", "expected"), [(9, False), (10, True), (11, True)])
def test_reported_at_least_compares_the_last_report_only(point: int, expected: bool) -> None:
    timeline = Timeline()
    assert not timeline.hidden.reported_at_least({"ff-1": 10})
    timeline.replica(99)
    timeline.replica(point)
    assert timeline.hidden.reported_at_least({"ff-1": 10}) is expected
    assert not timeline.hidden.reported_at_least({"ee-1": 1})


@pytest.mark.parametrize(("point", "expected"), [(99, False), (100, True), (101, True)])
def test_reached_compares_points_of_an_unknown_timeline(point: int, expected: bool) -> None:
    hidden = HiddenTimeline()
    assert not hidden.reached({"ff-1": 100})
    hidden.record({HIDDEN: point}, 2.0, 3.0, False)
    assert hidden.reached({"ff-1": 100}) is expected
    assert not hidden.reached({"ff-1": 100, "ee-1": 1})


def test_reached_is_false_for_a_known_timeline_and_without_a_minimum() -> None:
    hidden = HiddenTimeline()
    hidden.record({"ff-2": 100}, 2.0, 3.0, False)
    assert not hidden.reached({"ff-1": 10})
    assert not hidden.reached({"ff-2": 10})
    assert not hidden.reached({})
