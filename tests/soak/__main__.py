"""Run clients against real servers under faults, judge what they saw, and report it."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from .clients import run
from .faults import NAMES, schedule
from .history import History, Promise, Recorder, load
from .judge import Violation, judge, problems
from .picture import draw
from .rig import LAYOUTS, ROLES, SERVERS, running
from .shrink import Schedule, schedule_of, shrunk

# Seconds: the budget of a read beside its execution, and what a machine of two cores that runs
# the clients, the site and the servers adds.
BUDGET = 1.5 + 0.5
# Seconds that a write may take in addition to the read after it, which waits for the primary.
WRITE = 3.0


# Exit statuses: a guarantee was broken; the run is not evidence. 1 is an exception.
BROKEN, INVALID = 3, 2


def main() -> int:
    # Stop all servers on SIGTERM.
    signal.signal(signal.SIGTERM, lambda *received: sys.exit(1))
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--layout", choices=LAYOUTS, default="aliases")
    parser.add_argument("--server", choices=SERVERS, default="gunicorn")
    parser.add_argument("--role", choices=ROLES, default="monitor", help="on PostgreSQL")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument(
        "--faults", default=[], type=lambda text: text.split(","), help="only these"
    )
    parser.add_argument("--age", choices=("0", "none"), default="none", help="CONN_MAX_AGE")
    parser.add_argument("--monotonic", action="store_true", help="promise monotonic reads")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for a read")
    parser.add_argument("--history", type=Path, help="where to write the record")
    parser.add_argument("--judge", type=Path, help="judge a record instead of running")
    parser.add_argument("--report", type=Path, help="folder for a picture of the run")
    parser.add_argument("--shrink", type=Path, help="record of a run with these options that fails")
    given = parser.parse_args()
    if given.shrink:
        return shrink(given)
    if given.judge:
        return report(load(given.judge), given.report)
    path = given.history or Path(tempfile.gettempdir()) / f"soak-{given.layout}-{given.seed}.jsonl"
    print(f"{given.layout}, {given.server}, seed {given.seed}, {path}", flush=True)
    record(given, path)
    failed = report(load(path), given.report)
    if failed:
        again = f"python -m tests.soak {' '.join(sys.argv[1:])} --seed {given.seed}"
        print(f"Again: {again}\nSmaller: {again} --shrink {path}")
    return failed


def shrink(given: argparse.Namespace) -> int:
    """Run smaller and smaller schedules for as long as they fail."""
    path = Path(tempfile.gettempdir()) / f"soak-{given.layout}-{given.seed}-shrunk.jsonl"

    def fails(smaller: Schedule) -> bool:
        given.faults, given.users = smaller
        record(given, path)
        found = bool(judge(load(path)))
        print("fails " if found else "passes", smaller, flush=True)
        return found

    print("The smallest that fails:", shrunk(schedule_of(load(given.shrink), NAMES), fails))
    return BROKEN


def record(given: argparse.Namespace, path: Path) -> None:
    promises = {Promise.EVERY_DEVICE}
    settings = {}
    if given.monotonic:
        promises.add(Promise.MONOTONIC_READS)
        settings["PINNING_CONSISTENCY"] = "monotonic-reads"
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as name,
        path.open("w", buffering=1) as file,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        with running(given, folder, settings, path.with_suffix(".log")) as site:
            recorder = Recorder(file, promises, given.budget, given.budget + WRITE)
            over = threading.Event()
            faults = threading.Thread(
                target=schedule, args=(site, given.seed, recorder, over, given.faults)
            )
            faults.start()
            devices = run(site.port, given.users, given.seed, recorder, over.is_set)
            try:
                wait(given.seconds, path, over)
            finally:
                over.set()
                for thread in (*devices, faults):
                    thread.join()


def wait(seconds: float, path: Path, over: threading.Event) -> None:
    """Wait for the end of the run, on a terminal with a line of progress."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not over.wait(min(left, 1)):
        if not sys.stdout.isatty():
            continue
        print(f"\r{left:6.0f} s left, {path.stat().st_size / 1e6:.1f} MB", end="", flush=True)
    if sys.stdout.isatty():
        print("\r" + " " * 40, end="\r", flush=True)


def report(history: History, folder: Path | None = None) -> int:
    """Print what was seen, draw it if there is a folder, and return the exit status."""
    if folder:
        print(draw(history, folder))
    operations = history.operations
    reads = [each for each in operations if each.wrote is None]
    writes = [each for each in operations if each.wrote is not None]
    print(
        f"{len(operations):,} operations, {len(reads):,} reads by "
        f"{len({each.session.partition('.')[0] for each in operations})} devices"
    )
    for what, them in (("read", reads), ("write", writes)):
        print(f"longest {what} {max((each.ended - each.began for each in them), default=0):.2f} s")
    print("reads by server:", dict(Counter(each.server for each in reads if each.server)))
    faults = Counter(each.name for each in history.faults if not each.failed)
    print("faults:", dict(faults))
    print(
        "without success:", dict(Counter(each.status for each in operations if not each.succeeded))
    )
    violations = judge(history)
    for violation in violations[:20]:
        print(line(violation, history))
    print("violations:", dict(Counter(each.guarantee for each in violations)) or "none")
    wrong = problems(history)
    for problem in wrong:
        print(f"The run proves nothing: {problem}")
    return BROKEN if violations else INVALID if wrong else 0


def line(violation: Violation, history: History) -> str:
    operation = violation.operation
    start = min(each.began for each in history.operations)
    near = [
        fault.name
        for fault in history.faults
        if fault.began - 5 < operation.ended and operation.began < fault.end + 5
    ]
    return (
        f"{violation.guarantee}: {operation.session} {operation.kind} at "
        f"{operation.began - start:.2f} s from {operation.server or '?'}: "
        f"{violation.why} (near: {', '.join(near) or 'no fault'})"
    )


if __name__ == "__main__":
    sys.exit(main())
