from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from django.apps import AppConfig


@contextmanager
def _on_primary() -> Iterator[None]:
    from pinning_middleware.api import ignore_writes, use_primary

    with use_primary(), ignore_writes():
        yield


class PinningConfig(AppConfig):
    name = "pinning_middleware"
    verbose_name = "Pinning middleware"

    def ready(self) -> None:
        from pinning_middleware import checks, stats  # noqa: F401
        from pinning_middleware.backend import (
            execute,
            failover,
            generic_relations,
            instances,
            view_transactions,
            writes,
        )
        from pinning_middleware.stores import cache

        failover.install()
        writes.install()
        execute.install()
        generic_relations.install()
        instances.install()
        view_transactions.install()
        stats.install()
        # A cache that is a table of the database is no part of what a user reads and writes.
        cache.around = _on_primary
