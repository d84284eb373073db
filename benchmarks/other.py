"""
Run a benchmark of this checkout with the package of another one:

    python -m benchmarks.other ../pinning_middleware-0.1 faults --age 0
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    checkout, name, *options = sys.argv[1:]
    sys.path.insert(0, checkout)
    import pinning_middleware  # noqa: F401

    sys.path.pop(0)
    sys.argv = [name, *options]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
