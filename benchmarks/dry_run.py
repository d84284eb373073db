"""
The time that PINNING_DRY_RUN adds to a whole read: a query for one row of an SQLite database in
memory, inside a request. Blocks of reads with and without it alternate.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

import django

from . import settings

DATABASE = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
settings.DATABASES, settings.PINNING_REPLICAS = {"default": DATABASE}, []
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.settings")
django.setup()

from django.db import connection  # noqa: E402
from django.test import override_settings  # noqa: E402

from pinning_middleware.conf import conf  # noqa: E402
from pinning_middleware.routing import pools  # noqa: E402
from pinning_middleware.scopes.scope import Scope, enter  # noqa: E402

from .measure import fastest  # noqa: E402
from .models import Entry  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "300"))
TIMES = 300


def read() -> Any:
    return Entry.objects.filter(pk=1).first()


class Site:
    """The settings and the scope of a site, which can be entered without computing them anew."""

    def __init__(self, **settings: Any) -> None:
        with override_settings(**settings):
            self.scope = Scope()
            enter(self.scope)
            for _ in range(100):
                read()
            self.conf, self.pools = dict(conf.__dict__), pools._pools

    def measure(self) -> float:
        conf.__dict__.clear()
        conf.__dict__.update(self.conf)
        pools._pools = self.pools
        enter(self.scope)
        read()
        return fastest(read, TIMES)


def main() -> None:
    with connection.schema_editor() as editor:
        editor.create_model(Entry)
    Entry.objects.create(client="one", number=1)
    plain, dry = Site(), Site(PINNING_DRY_RUN={"default": 2})
    rounds = []
    for number in range(ROUNDS):
        first, second = (plain, dry) if number % 2 else (dry, plain)
        took = {first: first.measure(), second: second.measure()}
        rounds.append((took[plain], took[dry]))
    enter(None)
    added = statistics.median(with_it - without for without, with_it in rounds)
    without = statistics.median(without for without, _ in rounds)
    print(f"a read: {without * 1e6:.1f} µs; added by a dry run: {added * 1e6:.2f} µs")


if __name__ == "__main__":
    main()
