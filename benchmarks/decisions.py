"""
The time of one routing decision, inside a request that has done nothing yet: round robin, and with
a replica for each user.
"""

from __future__ import annotations

import os
import statistics

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.settings")
django.setup()

from django.db import router  # noqa: E402

from pinning_middleware.scopes.scope import Scope, enter  # noqa: E402

from .measure import ROUNDS, fastest  # noqa: E402
from .models import Entry  # noqa: E402

TIMES = 5000


def measure(scope: Scope) -> float:
    """Return the time of a decision in this scope (seconds)."""
    enter(scope)
    try:
        return fastest(lambda: router.db_for_read(Entry), TIMES)
    finally:
        enter(None)


def main() -> None:
    by_user = Scope()
    by_user.balance_key = lambda: "user"
    scopes = {"a decision": Scope(), "by user": by_user}
    took: dict[str, list[float]] = {name: [] for name in scopes}
    for _ in range(ROUNDS):
        for name, scope in scopes.items():
            took[name].append(measure(scope))
    for name, seconds in took.items():
        print(f"{name}: {statistics.median(seconds) * 1e6:.2f} µs")


if __name__ == "__main__":
    main()
