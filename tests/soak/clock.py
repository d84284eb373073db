"""A clock that a run can step in the processes of the site."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

__all__ = ["Clock", "follow"]


class Clock:
    """Seconds in a file, by which the wall clock of the site is ahead."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(8))
        self.path = path
        self._ahead = _shared(path)

    def step(self, seconds: float) -> None:
        self._ahead[0] = seconds


def follow(path: str) -> None:
    """Let ``time.time()`` of this process follow it. Before anything imports that function."""
    ahead, system = _shared(Path(path)), time.time
    time.time = lambda: system() + ahead[0]


def _shared(path: Path) -> memoryview:
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 8)).cast("d")
