"""
The record of a run: JSON lines, each an operation of a client, a fault or an error of the run.

Every session appends rows, numbered from 1, to a list of its own. A write appends the next number.
A read returns, for each list that it was asked for, the highest number, how many rows and how many
different numbers there are, and the owners of the rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, NamedTuple

__all__ = ["Error", "Fault", "History", "Operation", "Promise", "Recorder", "load"]


class Promise(StrEnum):
    """What the settings of the run promise beside read-your-writes of a session."""

    EVERY_DEVICE = "every device"
    MONOTONIC_READS = "monotonic reads"


class Operation(NamedTuple):
    """
    One read of a request, with the write before it; or that of a task that a request has started.

    ``session`` is a device of ``user``; its requests do not overlap, and those of one request are
    recorded in their order, with the times of the request. ``kind``: how it reads or
    writes. ``began`` and ``ended``: seconds on one clock. ``status`` of HTTP, 0: no answer.
    ``wrote``: the number that it appends to the list of its session. ``asked``: the lists that it
    read after that. For each list: ``saw``, the highest number; ``rows``, the number of rows;
    ``numbers``, the number of distinct numbers; ``owners``, the owners of the rows. ``server``: the
    server that answered. ``took``: seconds of the read alone, None if it has not ended.
    """

    user: str
    session: str
    kind: str
    began: float
    ended: float
    status: int
    wrote: int | None = None
    asked: list[str] = []  # noqa: RUF012
    saw: Mapping[str, int] = {}
    rows: Mapping[str, int] = {}
    numbers: Mapping[str, int] = {}
    owners: Mapping[str, list[str]] = {}
    server: str = ""
    took: float | None = None

    @property
    def succeeded(self) -> bool:
        return 200 <= self.status < 400


class Fault(NamedTuple):
    """
    What was done to the servers, and when. ``excuses``: which operations may fail or be slow
    meanwhile, "reads" or "writes"; "pins": those that no cookie carries may be lost; "stored pins":
    the same of those that were saved before; "lost writes": what was written meanwhile may be
    missing afterwards, although it was acknowledged.

    A fault is recorded when it begins, with ``ended`` None, and again when it has ended.
    ``failed``: an error prevented or ended it, such as that of a server that still starts.
    """

    name: str
    began: float
    ended: float | None
    excuses: list[str] = []  # noqa: RUF012
    failed: bool = False

    @property
    def end(self) -> float:
        """When it ended; infinity if it lasted until the run was killed."""
        return math.inf if self.ended is None else self.ended


class Error(NamedTuple):
    """An error of the run itself, which therefore proves nothing."""

    where: str
    text: str


class History(NamedTuple):
    """A whole run. ``budget`` and ``write_budget``: seconds that a read and a write may take."""

    promises: frozenset[Promise]
    budget: float
    write_budget: float
    operations: list[Operation]
    faults: list[Fault]
    errors: list[Error]

    @property
    def seconds(self) -> float:
        """From the beginning of the first operation to the end of the last one."""
        began = min((each.began for each in self.operations), default=0.0)
        return max((each.ended for each in self.operations), default=0.0) - began


class Recorder:
    """Writes a record while it happens, so that a run that is killed leaves one."""

    def __init__(
        self, file: IO[str], promises: Iterable[Promise], budget: float, write_budget: float
    ) -> None:
        self._file = file
        self._write({"promises": sorted(promises), "budget": budget, "write_budget": write_budget})

    def add(self, entry: Operation | Fault | Error) -> None:
        # One write of a whole line, so that threads need no lock.
        self._write({type(entry).__name__.lower(): entry._asdict()})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


def load(path: Path) -> History:
    """Return a recorded run."""
    with path.open() as file:
        return parse(file)


def parse(lines: Iterable[str]) -> History:
    """Return the run that these lines describe."""
    entries: Iterator[dict[str, Any]] = map(json.loads, lines)
    head = next(entries)
    promises = frozenset(map(Promise, head["promises"]))
    operations, errors = [], []
    faults: dict[tuple[str, float], Fault] = {}
    for entry in entries:
        if "operation" in entry:
            operations.append(Operation(**entry["operation"]))
        elif "fault" in entry:
            fault = Fault(**entry["fault"])
            # The entry of its end replaces the one of its beginning.
            faults[fault.name, fault.began] = fault
        else:
            errors.append(Error(**entry["error"]))
    budgets = head["budget"], head["write_budget"]
    return History(promises, *budgets, operations, list(faults.values()), errors)
