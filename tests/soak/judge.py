"""
Judge a record by the session guarantees of the literature (Terry et al., "Session Guarantees for
Weakly Consistent Replicated Data", 1994). Knows nothing of the package.

- Read your writes: a read shows what its session wrote before, or its user on any device.
- Monotonic reads: a read shows what its session has seen before.
- Writes follow reads: who sees a write also sees what its writer had seen before it.

Besides, a read shows rows of the asked list only, no number that nobody wrote, fails only while a
fault excuses it, and takes no longer than its budget.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from .history import Fault, History, Operation, Promise

__all__ = ["Violation", "judge"]

# A fault still has consequences for so many seconds: a retry may already wait for its server.
AFTERMATH = 2.0
# Kinds of operations that write when the headers of the response have been sent.
WITHOUT_COOKIE = {"stream"}


class Violation(NamedTuple):
    """A guarantee that an operation broke."""

    guarantee: str
    operation: Operation
    why: str


def judge(history: History) -> list[Violation]:
    """Return every violation, in the order in which the operations ended."""
    operations = sorted(history.operations, key=lambda each: each.ended)
    found = [
        *_read_your_writes(operations, Promise.EVERY_DEVICE in history.promises, history.faults),
        *_writes_follow_reads(operations),
        *_foreign_rows(operations),
        *_failures(operations, history.faults),
        *_budget(operations, history.budget, history.faults),
    ]
    if Promise.MONOTONIC_READS in history.promises:
        found += _monotonic_reads(operations)
    return sorted(found, key=lambda each: each.operation.ended)


def _read_your_writes(
    operations: list[Operation], every_device: bool, faults: list[Fault]
) -> Iterator[Violation]:
    users = {operation.session: operation.user for operation in operations}
    # What was acknowledged, by the time; the numbers of a list only grow.
    by_cookie: dict[str, list[tuple[float, int]]] = defaultdict(list)
    by_user: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for operation in operations:
        if operation.wrote is not None and operation.succeeded:
            acknowledged = operation.ended, operation.wrote
            by_user[operation.session].append(acknowledged)
            if operation.kind not in WITHOUT_COOKIE:
                by_cookie[operation.session].append(acknowledged)
    for operation in operations:
        if not operation.succeeded:
            continue
        for owner, seen in operation.saw.items():
            is_own = owner == operation.session
            wanted = 0
            if is_own:
                wanted = operation.wrote or _last_before(by_cookie[owner], operation.began)[1]
            if every_device and users.get(owner) == operation.user:
                at, number = _last_before(by_user[owner], operation.began)
                if not _overlaps(faults, "pins", at, operation.ended):
                    wanted = max(wanted, number)
            if seen < wanted:
                why = f"saw {seen} of {owner}, had written {wanted}"
                yield Violation("read your writes", operation, why)


def _last_before(numbers: list[tuple[float, int]], time: float) -> tuple[float, int]:
    index = bisect_left(numbers, (time, 0))
    return numbers[index - 1] if index else (0.0, 0)


def _monotonic_reads(operations: list[Operation]) -> Iterator[Violation]:
    seen: dict[tuple[str, str], int] = {}
    for operation in operations:
        if not operation.succeeded:
            continue
        for owner, number in operation.saw.items():
            before = seen.get((operation.session, owner), 0)
            if number < before:
                why = f"saw {number} of {owner}, had seen {before}"
                yield Violation("monotonic reads", operation, why)
            seen[operation.session, owner] = max(number, before)


def _writes_follow_reads(operations: list[Operation]) -> Iterator[Violation]:
    # For each write, what its session had seen: (session, number) -> {owner: number}.
    followed: dict[tuple[str, int], dict[str, int]] = {}
    seen: dict[str, dict[str, int]] = defaultdict(dict)
    for operation in operations:
        own = seen[operation.session]
        if operation.wrote is not None:
            followed[operation.session, operation.wrote] = dict(own)
        if operation.succeeded:
            for owner, number in operation.saw.items():
                own[owner] = max(number, own.get(owner, 0))
    for operation in operations:
        if not operation.succeeded:
            continue
        for writer, number in operation.saw.items():
            for owner, wanted in followed.get((writer, number), {}).items():
                if operation.saw.get(owner, wanted) < wanted:
                    why = (
                        f"saw {number} of {writer}, which had seen {wanted} of {owner}, "
                        f"but only {operation.saw[owner]} of {owner}"
                    )
                    yield Violation("writes follow reads", operation, why)


def _foreign_rows(operations: list[Operation]) -> Iterator[Violation]:
    begun: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for operation in sorted(operations, key=lambda each: each.began):
        if operation.wrote is not None:
            begun[operation.session].append((operation.began, operation.wrote))
    for operation in operations:
        for asked, owners in operation.owners.items():
            if set(owners) - {asked}:
                yield Violation("foreign row", operation, f"asked for {asked}, got {owners}")
        for asked, number in operation.saw.items():
            _, written = _last_before(begun[asked], operation.ended)
            if number > written:
                why = f"saw {number} of {asked}, which had begun to write {written}"
                yield Violation("foreign row", operation, why)


def _failures(operations: list[Operation], faults: list[Fault]) -> Iterator[Violation]:
    for operation in operations:
        if not operation.succeeded and not _is_excused(operation, faults):
            yield Violation("availability", operation, f"status {operation.status}")


def _budget(operations: list[Operation], budget: float, faults: list[Fault]) -> Iterator[Violation]:
    for operation in operations:
        took = operation.ended - operation.began
        if operation.wrote is None and took > budget and not _is_excused(operation, faults):
            yield Violation("budget", operation, f"{took:.2f} s")


def _is_excused(operation: Operation, faults: list[Fault]) -> bool:
    what = "reads" if operation.wrote is None else "writes"
    return _overlaps(faults, what, operation.began, operation.ended)


def _overlaps(faults: list[Fault], excused: str, began: float, ended: float) -> bool:
    return any(
        excused in fault.excuses and fault.began <= ended and began <= fault.ended + AFTERMATH
        for fault in faults
    )
