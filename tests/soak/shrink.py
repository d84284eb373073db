"""Find fewer faults and users with which a run still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from .history import History
from .judge import judge

__all__ = ["Schedule", "schedule_of", "shrunk"]


class Schedule(NamedTuple):
    """The faults of a run, in their order, and how many users it has."""

    faults: list[str]
    users: int

    def __str__(self) -> str:
        return f"--users {self.users} --faults {','.join(self.faults)}"


def schedule_of(history: History, known: set[str]) -> Schedule:
    """Return what led to the first violation. ``known``: faults rather than parts of them."""
    end = min(violation.operation.ended for violation in judge(history))
    faults = [each.name for each in history.faults if each.name in known and each.began < end]
    return Schedule(faults, len({each.user for each in history.operations}))


def shrunk(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """Return a smaller schedule that fails, and of which nothing smaller was seen to fail."""
    smaller = next(filter(fails, _smaller(schedule)), None)
    return schedule if smaller is None else shrunk(smaller, fails)


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    faults, users = schedule
    if len(faults) > 1:
        # What happened last is the likeliest cause.
        middle = len(faults) // 2
        yield Schedule(faults[middle:], users)
        yield Schedule(faults[:middle], users)
        distinct = list(dict.fromkeys(faults))
        if len(distinct) < len(faults):
            yield Schedule(distinct, users)
        # One without each of the others, when no half fails.
        elif len(faults) > 2:
            for index in range(len(faults)):
                yield Schedule(faults[:index] + faults[index + 1 :], users)
    if users > 1:
        yield Schedule(faults, users // 2)
