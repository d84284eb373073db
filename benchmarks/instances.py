"""Time to fetch a thousand rows of a replica, with and without the wrapper of ``from_db()``."""

from __future__ import annotations

from typing import Any

from django.db.models import Model

from .fleet import site
from .measure import compare

ROWS = 1000
# Django's own.
PLAIN: Any = Model.__dict__["from_db"]


def main() -> None:
    with site() as cluster:
        from .models import Entry

        ours: Any = Model.__dict__["from_db"]
        assert ours is not PLAIN
        Entry.objects.bulk_create(Entry(client=str(n), number=n) for n in range(ROWS))
        cluster.wait_caught_up()

        def fetch(way: Any) -> None:
            Model.from_db = way  # type: ignore[method-assign]
            rows = list(Entry.objects.using("replica1").all()[:ROWS])
            assert len(rows) == ROWS
            assert rows[0]._state.db == ("default" if way is ours else "replica1")

        fetch(ours)
        print("1,000 rows:", compare(lambda: fetch(ours), lambda: fetch(PLAIN), 5))


if __name__ == "__main__":
    main()
