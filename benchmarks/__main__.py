"""
The figures that the README gives, each measured beside what it is compared with, in one run:

    python -m benchmarks                    all of them
    python -m benchmarks decisions          one
    python -m benchmarks clients --asgi     one, of a site that is run otherwise
"""

from __future__ import annotations

import subprocess
import sys

NAMES = (
    "decisions",
    "memory",
    "overhead",
    "questions",
    "instances",
    "latency",
    "clients",
    "endpoints",
    "faults",
    "silence",
)


def main() -> int:
    given = sys.argv[1:]
    first = next((n for n, word in enumerate(given) if word.startswith("-")), len(given))
    names, options = given[:first] or NAMES, given[first:]
    unknown = set(names) - set(NAMES)
    if unknown:
        print(f"There is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}.")
        return 2
    # A process each, so that none sees what another has set up.
    for name in names:
        print(f"== {name}", flush=True)
        if code := subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *options]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
