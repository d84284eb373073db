"""The time of one routing decision, inside a request that has done nothing yet."""

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


def main() -> None:
    enter(Scope())
    try:
        took = [fastest(lambda: router.db_for_read(Entry), TIMES) for _ in range(ROUNDS)]
    finally:
        enter(None)
    print(f"a decision: {statistics.median(took) * 1e6:.2f} µs")


if __name__ == "__main__":
    main()
