"""
Measurements, among them the figures of docs/benchmarks.md. Each run measures its comparison too.

    python -m benchmarks                    all of them
    python -m benchmarks decisions          one of them
    python -m benchmarks clients --asgi     one of them, with options
"""

from __future__ import annotations

import subprocess
import sys

NAMES = (
    "decisions",
    "dry_run",
    "not_found",
    "memory",
    "overhead",
    "parts",
    "probes",
    "instances",
    "latency",
    "capacity",
    "clients",
    "endpoints",
    "faults",
    "herds",
    "recovery",
    "unresponsive",
    "waits",
    "statements",
)


def main() -> int:
    given = sys.argv[1:]
    first = next((n for n, word in enumerate(given) if word.startswith("-")), len(given))
    names, options = given[:first] or NAMES, given[first:]
    unknown = set(names) - set(NAMES)
    if unknown:
        print(f"There is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}.")
        return 2
    # A process for each, since each sets up Django in its own way.
    for name in names:
        print(f"== {name}", flush=True)
        if code := subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *options]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
