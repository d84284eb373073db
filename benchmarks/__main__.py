from __future__ import annotations

import subprocess
import sys

NAMES = ("decisions", "overhead", "memory", "latency", "clients", "faults")


def main() -> int:
    names = sys.argv[1:] or NAMES
    unknown = set(names) - set(NAMES)
    if unknown:
        print(f"There is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}.")
        return 2
    # A process each, so that none sees what another has set up.
    for name in names:
        print(f"== {name}", flush=True)
        if code := subprocess.call([sys.executable, "-m", f"benchmarks.{name}"]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
