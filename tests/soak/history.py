"""
The record of a run: JSON lines, each an operation of a client or a fault.

Every session appends rows, numbered from 1, to a list of its own. A write appends the next number.
A read returns, for each list that it was asked for, the highest number and the owners of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, NamedTuple

__all__ = ["Fault", "History", "Operation", "Promise", "Recorder", "load"]


class Promise(StrEnum):
    """What the settings of the run promise beside read-your-writes of a session."""

    EVERY_DEVICE = "every device"
    MONOTONIC_READS = "monotonic reads"


class Operation(NamedTuple):
    """
    One request, or one task that a request has started.

    ``session`` is a device of ``user``; its operations do not overlap. ``kind``: how it reads or
    writes. ``began`` and ``ended``: seconds on one clock. ``status`` of HTTP, 0: no answer.
    ``wrote``: the number that it appends to the list of its session. ``saw``: what it read after
    that, the highest number of each list; ``owners``: those of the rows; ``server``: which server
    answered the read.
    """

    user: str
    session: str
    kind: str
    began: float
    ended: float
    status: int
    wrote: int | None = None
    saw: Mapping[str, int] = {}
    owners: Mapping[str, list[str]] = {}
    server: str = ""

    @property
    def succeeded(self) -> bool:
        return 200 <= self.status < 400


class Fault(NamedTuple):
    """
    What was done to the servers, and when. ``excuses``: which operations may fail or be slow
    meanwhile, "reads" or "writes", and whether "pins" may be lost that no cookie carries.
    """

    name: str
    began: float
    ended: float
    excuses: list[str] = []  # noqa: RUF012


class History(NamedTuple):
    """A whole run. ``budget``: seconds that a read may take beside its execution."""

    promises: frozenset[Promise]
    budget: float
    operations: list[Operation]
    faults: list[Fault]


class Recorder:
    """Writes a record while it happens, so that a run that is killed leaves one."""

    def __init__(self, file: IO[str], promises: Iterable[Promise], budget: float) -> None:
        self._file = file
        self._write({"promises": sorted(promises), "budget": budget})

    def add(self, entry: Operation | Fault) -> None:
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
    history = History(frozenset(map(Promise, head["promises"])), head["budget"], [], [])
    for entry in entries:
        if "operation" in entry:
            history.operations.append(Operation(**entry["operation"]))
        else:
            history.faults.append(Fault(**entry["fault"]))
    return history
