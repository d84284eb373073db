"""
The time that PINNING_DRY_RUN adds to a whole read: a query for one row of an SQLite database in
memory, inside a request that has written before, or not. Blocks of reads with and without it
alternate.
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

from .measure import fastest, ratio  # noqa: E402
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

    def measure(self, *, has_written: bool) -> float:
        conf.__dict__.clear()
        conf.__dict__.update(self.conf)
        pools._pools = self.pools
        enter(Scope() if has_written else self.scope)
        if has_written:
            Entry.objects.update(number=2)
        read()
        return fastest(read, TIMES)


def main() -> None:
    with connection.schema_editor() as editor:
        editor.create_model(Entry)
    Entry.objects.create(client="one", number=1)
    plain, dry = Site(), Site(PINNING_DRY_RUN={"default": 2})
    for has_written in (False, True):
        rounds = []
        for number in range(ROUNDS):
            first, second = (plain, dry) if number % 2 else (dry, plain)
            took = {site: site.measure(has_written=has_written) for site in (first, second)}
            rounds.append((took[dry], took[plain]))
        added = statistics.median(with_it - without for with_it, without in rounds)
        name = "a read after a write" if has_written else "a read"
        print(f"{name} in a dry run: {ratio(rounds)}, {added * 1e6:.1f} µs more")
    enter(None)


if __name__ == "__main__":
    main()
