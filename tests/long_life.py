"""
Serve a site for an hour while replicas come and go, and fail if it grows:

    python -m tests.long_life [--variant gevent] [--seconds 3600]

Clients of the soak write and read in each of its ways. Meanwhile the memory, threads, descriptors
and objects of the server's processes are sampled, and the connections on each database server. A
line is fitted through the second half of the samples of each, and must not rise beyond its bound.
What the clients saw is judged as in the soak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import psycopg

from sample_site.cluster import Cluster
from tests.soak.__main__ import INVALID, WRITE, report, wait
from tests.soak.clients import run
from tests.soak.faults import REPLICA_FAULTS, schedule
from tests.soak.history import Error, Promise, Recorder, load
from tests.soak.rig import Running, running

# Variant → layout and server of the soak.
VARIANTS: Final[Mapping[str, tuple[str, str]]] = {
    "pool": ("pool", "gunicorn"),
    "gevent": ("aliases", "gevent"),
    "preload": ("pool", "preload"),
    "max-requests": ("pool", "max-requests"),
}
# How much a fitted line may rise within the second half of a run: what requests under way and
# replaced connections amount to. "Connection" counts those of psycopg.
BOUNDS: Final[Mapping[str, float]] = {
    "MB": 6,
    "threads": 3,
    "descriptors": 16,
    "connections": 16,
    "objects": 3000,
    "Scope": 10,
    "Context": 30,
    "DatabaseWrapper": 20,
    "Connection": 16,
}
# Those of objects are of a worker, and gone if it is replaced.
COUNTED: Final = {"objects", "Scope", "Context", "DatabaseWrapper", "Connection"}
# Seconds between two samples.
EVERY: Final = 5.0
PAGE: Final = os.sysconf("SC_PAGE_SIZE") / 1e6
CONNECTIONS: Final = """
SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND usename <> user
"""
# Seconds for a read, on a machine that also runs the clients and the servers.
BUDGET: Final = 5.0
# The exit status, beside those of the soak.
GROWN: Final = 4


class Sample(NamedTuple):
    """A measurement: time (seconds), source, quantity and value."""

    at: float
    of: str
    name: str
    value: float


def children(process: int) -> list[int]:
    """Return the processes that a process has started."""
    return [
        int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def of_process(process: int) -> dict[str, float]:
    """Return what the system knows of a process."""
    folder = Path(f"/proc/{process}")
    return {
        "MB": int((folder / "statm").read_text().split()[1]) * PAGE,
        "threads": len(os.listdir(folder / "task")),
        "descriptors": len(os.listdir(folder / "fd")),
    }


def of_workers(port: int, workers: Collection[int]) -> dict[int, dict[str, float]]:
    """Return the numbers of objects in each worker; which one answers cannot be chosen."""
    found: dict[int, dict[str, float]] = {}

    def ask(_: int) -> None:
        with suppress(OSError, ValueError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/objects/", timeout=10) as answer:
                counts = json.load(answer)
            found[counts.pop("process")] = counts

    deadline = time.monotonic() + EVERY
    # While one worker counts, another one accepts the next request.
    with ThreadPoolExecutor(4) as threads:
        while set(workers) - set(found) and time.monotonic() < deadline:
            list(threads.map(ask, range(4)))
    return found


def sample(site: Running) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what is measured, and the values."""
    workers = children(site.server_pid)
    objects = of_workers(site.port, workers)
    # A worker may be replaced meanwhile.
    with suppress(OSError):
        yield "parent", of_process(site.server_pid)
        measured = {each: of_process(each) | objects.get(each, {}) for each in workers}
        for process, values in measured.items():
            yield f"worker {process}", values
    assert isinstance(site.rig.servers, Cluster)
    for node in site.rig.servers.nodes.values():
        with suppress(psycopg.Error):
            yield node.name, {"connections": node.execute(CONNECTIONS)[0][0]}


def watch(site: Running, samples: list[Sample], recorder: Recorder, over: threading.Event) -> None:
    """Take samples until the run is over. An unexpected error ends it."""
    start = time.monotonic()
    try:
        while not over.wait(EVERY):
            at = time.monotonic() - start
            for of, values in sample(site):
                samples += [Sample(at, of, name, value) for name, value in values.items()]
    except Exception:
        recorder.add(Error("the samples", traceback.format_exc()))
        over.set()


# The judgement


class Trend(NamedTuple):
    """A series: its first value, and the line through its second half."""

    of: str
    name: str
    first: float
    half: float
    end: float

    @property
    def rise(self) -> float:
        return self.end - self.half

    @property
    def is_growth(self) -> bool:
        return self.rise > BOUNDS[self.name]


def trends(samples: Sequence[Sample]) -> list[Trend]:
    """Fit a line through the second half of each series that lasts for all of it."""
    end = max((each.at for each in samples), default=0.0)
    series: dict[tuple[str, str], list[Sample]] = {}
    for each in samples:
        series.setdefault((each.of, each.name), []).append(each)
    found = []
    for (of, name), them in series.items():
        late = [each for each in them if each.at >= end / 2]
        # Workers are replaced, and servers are down at times.
        if len(late) < 3 or late[0].at > end * 0.6 or late[-1].at < end * 0.9:
            continue
        times, values = [each.at for each in late], [each.value for each in late]
        line = statistics.linear_regression(times, values)
        at_half, at_end = (line.intercept + line.slope * at for at in (end / 2, end))
        found.append(Trend(of, name, them[0].value, at_half, at_end))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.long_life", description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="pool")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    path = Path(tempfile.gettempdir()) / f"long-life-{given.variant}.jsonl"
    samples = record(given, path)
    path.with_suffix(".samples.json").write_text(json.dumps(samples))
    failed = report(load(path))
    found = trends(samples)
    required = set(BOUNDS) - (COUNTED if given.variant == "max-requests" else set())
    missing = required - {each.name for each in found}
    if missing:
        print(f"The run proves nothing: too few samples of {', '.join(sorted(missing))}")
        return failed or INVALID
    print(f"{'':14} {'':16} {'first':>10} {'half':>10} {'end':>10} {'rise':>8} {'bound':>8}")
    for each in sorted(found):
        numbers = f"{each.first:10.1f} {each.half:10.1f} {each.end:10.1f} {each.rise:8.1f}"
        grown = "  GROWS" if each.is_growth else ""
        print(f"{each.of:14} {each.name:16} {numbers} {BOUNDS[each.name]:8}{grown}")
    return failed or (GROWN if any(each.is_growth for each in found) else 0)


def record(given: argparse.Namespace, path: Path) -> list[Sample]:
    given.layout, given.server = VARIANTS[given.variant]
    given.role, given.age, given.budget = "monitor", "none", BUDGET
    samples: list[Sample] = []
    with (
        tempfile.TemporaryDirectory(prefix="long-life-") as name,
        path.open("w", buffering=1) as file,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        with running(given, folder, {}, folder / "site.log") as site:
            recorder = Recorder(file, {Promise.EVERY_DEVICE}, BUDGET, BUDGET + WRITE)
            over = threading.Event()
            faults = threading.Thread(
                target=schedule, args=(site, given.seed, recorder, over, REPLICA_FAULTS)
            )
            watching = threading.Thread(target=watch, args=(site, samples, recorder, over))
            threads = [faults, watching]
            for thread in threads:
                thread.start()
            threads += run(site.port, given.users, given.seed, recorder, over.is_set)
            try:
                wait(given.seconds, path, over)
            finally:
                over.set()
                for thread in threads:
                    thread.join()
    return samples


if __name__ == "__main__":
    sys.exit(main())
