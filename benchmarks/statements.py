"""
Time to classify a statement of 40 kB (kind and effect on the session), which runs uncached.

    python -m benchmarks.statements
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pinning_middleware.sql import alters_session, kind_of

COLUMNS = ("is_open", "is_blocked", "withdrawn", "point_o", "locked_at", "is_locked")
SHAPES: dict[str, Callable[[str], str]] = {
    "IN with parameters": lambda column: (
        f'SELECT "t"."{column}" FROM "t" WHERE "t"."{column}" IN ({", ".join(["%s"] * 10_000)})'
    ),
    "OR of conditions": lambda column: (
        f'SELECT 1 FROM "t" WHERE {" OR ".join([f"{chr(34)}t{chr(34)}.{column} = %s"] * 1800)}'
    ),
    "substring ... FOR": lambda column: (
        f"SELECT substring({column} FROM 1 FOR 2) FROM t WHERE a IN ({', '.join(['%s'] * 10_000)})"
    ),
    "bulk INSERT": lambda column: (
        f'INSERT INTO "t" ("{column}", "a") VALUES {", ".join(["(%s, %s)"] * 4_000)}'
    ),
}


def milliseconds(sql: str, vendor: str) -> float:
    times = []
    for _ in range(7):
        started = time.perf_counter()
        kind_of(sql, vendor)
        alters_session(sql, vendor)
        times.append(time.perf_counter() - started)
    return min(times) * 1000


def main() -> None:
    vendors = ("postgresql", "mysql", "sqlite", "oracle")
    print(f"{'statement':20} {'column':12} {'kB':>5}  " + " ".join(f"{v:>12}" for v in vendors))
    for shape, make in SHAPES.items():
        for column in COLUMNS:
            sql = make(column)
            row = " ".join(f"{milliseconds(sql, vendor):9.3f} ms" for vendor in vendors)
            print(f"{shape:20} {column:12} {len(sql) / 1000:5.1f}  {row}")


if __name__ == "__main__":
    main()
