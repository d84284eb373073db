"""
Judge a record by the session guarantees of the literature (Terry et al., "Session Guarantees for
Weakly Consistent Replicated Data", 1994). Knows nothing of the package.

- Read your writes: a read shows what its session wrote before, or its user on any device.
- Monotonic reads: a read shows what its session has seen before.
- Writes follow reads: a session that sees a write also sees what its writer had seen before it.
- Followed keys: every session sees what a task wrote that pinned the key of its list.

Monotonic reads and writes follow reads concern writes that were acknowledged when the read began:
PostgreSQL sends a commit to its standbys before it shows it on the primary.

In addition, a read answers for every list that it was asked for. It shows rows of these lists only,
no number that was never written, every acknowledged number up to the highest, and none twice. A
request fails only while a fault excuses it. No read takes longer than its budget, and no request
longer than its reads may in all.

A promotion may lose writes that no replica had received. They, and whatever followed from having
seen them, may be missing from reads that end later.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .history import Fault, History, Operation, Promise

__all__ = ["Violation", "judge", "problems"]

# Seconds for which a fault still has consequences: a retry may already wait for its server.
AFTERMATH = 2.0
# Kinds of operations that write after the headers of the response have been sent, or in a task.
WITHOUT_COOKIE = {"stream", "after", "by-task"}
# Kinds of operations whose read does not update the pins of their session.
ISOLATED = {"task", "by-task"}
# Kinds of writes that pin the key of their list, which every reader follows.
FOLLOWED = {"by-task"}
# Seconds after which a run without a successful fault proves nothing.
MAX_SECONDS_WITHOUT_FAULT = 10.0


class Violation(NamedTuple):
    """A guarantee that an operation broke."""

    guarantee: str
    operation: Operation
    why: str


class Losses:
    """Which writes a promotion may have lost, and when."""

    def __init__(self, history: History) -> None:
        self._acknowledged: dict[str, list[int]] = defaultdict(list)
        self._lost_at: dict[str, dict[int, float]] = defaultdict(dict)
        faults = [fault for fault in history.faults if "lost writes" in fault.excuses]
        for operation in sorted(history.operations, key=lambda each: each.wrote or 0):
            if operation.wrote is None:
                continue
            if operation.succeeded:
                self._acknowledged[operation.session].append(operation.wrote)
            for fault in faults:
                # No AFTERMATH is added: only writes made during the fault can be lost.
                if fault.began <= operation.ended and operation.began <= fault.end:
                    self._lost_at[operation.session][operation.wrote] = fault.end

    def may_miss(self, operation: Operation, owner: str, number: int) -> bool:
        """Return whether a read may miss a number of a list because it was lost."""
        lost_at = self._lost_at.get(owner)
        return lost_at is not None and lost_at.get(number, math.inf) <= operation.ended

    def last_kept(self, operation: Operation, owner: str, number: int) -> int:
        """Return what a read must show of a list whose number was seen before."""
        numbers = self._acknowledged[owner]
        index = bisect_left(numbers, number)
        while number and self.may_miss(operation, owner, number):
            index -= 1
            number = numbers[index] if index >= 0 else 0
        return number

    def count(self, operation: Operation, owner: str, highest: int) -> int:
        """Return how many acknowledged numbers up to this one a read must show."""
        numbers = self._acknowledged[owner]
        missed = [each for each in self._lost_at.get(owner, ()) if each <= highest]
        return bisect_right(numbers, highest) - sum(
            self.may_miss(operation, owner, each)
            for each in missed
            if bisect_left(numbers, each) < bisect_right(numbers, each)
        )


def judge(history: History) -> list[Violation]:
    """Return every violation, in the order in which the operations ended."""
    operations = sorted(history.operations, key=lambda each: each.ended)
    losses = Losses(history)
    pin_faults = [each for each in history.faults if {"pins", "stored pins"} & {*each.excuses}]
    every_device = Promise.EVERY_DEVICE in history.promises
    found = [
        *_read_your_writes(operations, pin_faults, losses, every_device),
        *_followed_keys(operations, pin_faults, losses),
        *_writes_follow_reads(operations, losses),
        *_incomplete_answers(operations),
        *_foreign_rows(operations),
        *_lost_and_duplicate_writes(operations, losses),
        *_failures(operations, history),
        *_budget(operations, history),
    ]
    if Promise.MONOTONIC_READS in history.promises:
        found += _monotonic_reads(operations, pin_faults, losses)
    return sorted(found, key=lambda each: each.operation.ended)


def problems(history: History) -> list[str]:
    """Return why the run is not evidence, whatever its clients saw."""
    found = [f"error in {error.where}: {error.text}" for error in history.errors]
    if not history.operations:
        found.append("no operation was recorded")
    if history.seconds > MAX_SECONDS_WITHOUT_FAULT and all(
        fault.failed for fault in history.faults
    ):
        found.append(f"no fault succeeded in {history.seconds:.0f} s")
    return found


def _read_your_writes(
    operations: list[Operation], faults: list[Fault], losses: Losses, every_device: bool
) -> Iterator[Violation]:
    users = {operation.session: operation.user for operation in operations}
    saved = [each for each in operations if not _may_lose_pins_saved_by(each, faults)]
    by_user = _acknowledged(saved)
    by_cookie = _acknowledged(each for each in operations if each.kind not in WITHOUT_COOKIE)
    for operation in operations:
        if not operation.succeeded:
            continue
        kept_since = _pins_kept_since(operation, faults)
        for owner, seen in operation.saw.items():
            is_own = owner == operation.session
            wanted = 0
            if is_own:
                wanted = operation.wrote or _last_before(by_cookie[owner], operation.began)
            if every_device and users.get(owner) == operation.user:
                wanted = max(wanted, _last_before(by_user[owner], operation.began, kept_since))
            wanted = losses.last_kept(operation, owner, wanted)
            if seen < wanted:
                why = f"saw {seen} of {owner}, had written {wanted}"
                yield Violation("read your writes", operation, why)


def _followed_keys(
    operations: list[Operation], faults: list[Fault], losses: Losses
) -> Iterator[Violation]:
    by_key = _acknowledged(
        each
        for each in operations
        if each.kind in FOLLOWED and not _may_lose_pins_saved_by(each, faults)
    )
    for operation in operations:
        if not operation.succeeded:
            continue
        kept_since = _pins_kept_since(operation, faults)
        for owner, seen in operation.saw.items():
            wanted = _last_before(by_key[owner], operation.began, kept_since)
            wanted = losses.last_kept(operation, owner, wanted)
            if seen < wanted:
                why = f"saw {seen} of {owner}, a task had written {wanted}"
                yield Violation("followed keys", operation, why)


def _acknowledged(operations: Iterable[Operation]) -> dict[str, list[tuple[float, int]]]:
    """Return the numbers of each list, which only grow, and when each write ended."""
    found: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for operation in operations:
        if operation.wrote is not None and operation.succeeded:
            found[operation.session].append((operation.ended, operation.wrote))
    return found


def _last_before(numbers: list[tuple[float, int]], time: float, since: float = -math.inf) -> int:
    """Return the last number before a time, 0 if it is not later than ``since``."""
    index = bisect_left(numbers, (time, 0))
    return numbers[index - 1][1] if index and numbers[index - 1][0] > since else 0


def _may_lose_pins_saved_by(operation: Operation, faults: list[Fault]) -> bool:
    return _overlaps(faults, "pins", operation.began, operation.ended + AFTERMATH)


def _pins_kept_since(operation: Operation, faults: list[Fault]) -> float:
    """Return since when pins that no cookie carries can be read; infinity if not at all."""
    if _overlaps(faults, "pins", operation.began, operation.ended):
        return math.inf
    return max(
        (
            fault.end
            for fault in faults
            if "stored pins" in fault.excuses and fault.began <= operation.ended
        ),
        default=-math.inf,
    )


def _monotonic_reads(
    operations: list[Operation], faults: list[Fault], losses: Losses
) -> Iterator[Violation]:
    by_cookie: dict[tuple[str, str], int] = defaultdict(int)
    by_cache: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    acknowledged = _acknowledged(operations)
    for operation in operations:
        if not operation.succeeded:
            continue
        kept_since = _pins_kept_since(operation, faults)
        for owner, number in operation.saw.items():
            key = operation.session, owner
            by_now = _last_before(by_cache[key], operation.began, kept_since)
            before = max(by_cookie[key], by_now)
            before = min(before, _last_before(acknowledged[owner], operation.began))
            before = losses.last_kept(operation, owner, before)
            if number < before:
                why = f"saw {number} of {owner}, had seen {before}"
                yield Violation("monotonic reads", operation, why)
            if operation.kind in ISOLATED:
                continue
            if operation.kind not in WITHOUT_COOKIE:
                by_cookie[key] = max(number, by_cookie[key])
            elif not _may_lose_pins_saved_by(operation, faults):
                by_cache[key].append((operation.ended, max(number, by_now)))


def _writes_follow_reads(operations: list[Operation], losses: Losses) -> Iterator[Violation]:
    # For each write, what its session had seen: (session, number) -> {owner: number}. This includes
    # what a task saw: a later write follows it in the log of the primary, whatever the pins are.
    followed: dict[tuple[str, int], dict[str, int]] = {}
    seen: dict[str, dict[str, int]] = defaultdict(dict)
    acknowledged = _acknowledged(operations)
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
            for owner, seen_by_writer in followed.get((writer, number), {}).items():
                wanted = min(seen_by_writer, _last_before(acknowledged[owner], operation.began))
                wanted = losses.last_kept(operation, owner, wanted)
                if operation.saw.get(owner, wanted) < wanted:
                    why = (
                        f"saw {number} of {writer}, which had seen {wanted} of {owner}, "
                        f"but only {operation.saw[owner]} of {owner}"
                    )
                    yield Violation("writes follow reads", operation, why)


def _incomplete_answers(operations: list[Operation]) -> Iterator[Violation]:
    for operation in operations:
        if not operation.succeeded:
            continue
        answered = operation.saw.keys() & operation.rows.keys() & operation.numbers.keys()
        if missing := set(operation.asked) - answered:
            why = f"no answer for {', '.join(sorted(missing))}"
            yield Violation("incomplete answer", operation, why)


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
            written = _last_before(begun[asked], operation.ended)
            if number > written:
                why = f"saw {number} of {asked}, which had begun to write {written}"
                yield Violation("foreign row", operation, why)


def _lost_and_duplicate_writes(operations: list[Operation], losses: Losses) -> Iterator[Violation]:
    for operation in operations:
        if not operation.succeeded:
            continue
        for owner, highest in operation.saw.items():
            # A list is appended to in order: what shows a number shows those acknowledged before.
            wanted = losses.count(operation, owner, highest)
            numbers = operation.numbers.get(owner, wanted)
            if numbers < wanted:
                why = f"{numbers} numbers of {owner} up to {highest}, {wanted} were acknowledged"
                yield Violation("lost write", operation, why)
            if (rows := operation.rows.get(owner, numbers)) > numbers:
                why = f"{rows} rows of {owner} with {numbers} numbers"
                yield Violation("duplicate write", operation, why)


def _failures(operations: list[Operation], history: History) -> Iterator[Violation]:
    for operation in operations:
        if not operation.succeeded and not _is_excused(operation, history):
            yield Violation("availability", operation, f"status {operation.status}")


def _budget(operations: list[Operation], history: History) -> Iterator[Violation]:
    reads = Counter((each.session, each.began) for each in operations)
    for operation in operations:
        budget, number = _budget_of(operation, history), reads[operation.session, operation.began]
        took, of_request = operation.took or 0.0, operation.ended - operation.began
        is_slow = took > budget or of_request > budget * number
        if is_slow and not _is_excused(operation, history):
            yield Violation("budget", operation, f"{max(took, of_request / number):.2f} s")


def _budget_of(operation: Operation, history: History) -> float:
    return history.budget if operation.wrote is None else history.write_budget


def _is_excused(operation: Operation, history: History) -> bool:
    what = "reads" if operation.wrote is None else "writes"
    latest = operation.ended - _budget_of(operation, history)
    # It may fail or be slow meanwhile, but it also ends soon after the fault.
    return any(
        what in fault.excuses
        and fault.began <= operation.ended
        and max(operation.began, latest) <= fault.end + AFTERMATH
        for fault in history.faults
    )


def _overlaps(faults: list[Fault], excused: str, began: float, ended: float) -> bool:
    return any(
        excused in fault.excuses and fault.began <= ended and began <= fault.end + AFTERMATH
        for fault in faults
    )
