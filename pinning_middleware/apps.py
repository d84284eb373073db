from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from django.apps import AppConfig


@contextmanager
def _on_primary() -> Iterator[None]:
    from .verbs import ignore_writes, use_primary

    with use_primary(), ignore_writes():
        yield


class PinningConfig(AppConfig):
    name = "pinning_middleware"
    verbose_name = "Pinning middleware"

    def ready(self) -> None:
        from . import checks, stats  # noqa: F401
        from .routing import failover, instances, statements
        from .scopes import view_transactions
        from .stores import cache
        from .writes import generic, watch

        failover.install()
        watch.install()
        statements.install()
        generic.install()
        instances.install()
        view_transactions.install()
        stats.install()
        # A cache that is a table of the database is no part of what a user reads and writes.
        cache.around = _on_primary
