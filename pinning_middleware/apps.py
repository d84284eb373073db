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
        from pinning_middleware.backend import patches
        from pinning_middleware.stores import cache

        patches.install()
        stats.install()
        # Reads and writes of a database cache do not count as those of a user.
        cache.db_cache_context = _on_primary
