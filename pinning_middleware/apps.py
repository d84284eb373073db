from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from django.apps import AppConfig


@contextmanager
def _on_primary() -> Iterator[None]:
    from pinning_middleware.api import ignore_writes, use_primary

    with use_primary(), ignore_writes():
        yield


@contextmanager
def _unmanaged() -> Iterator[None]:
    from pinning_middleware.api import use_primary
    from pinning_middleware.backend.session_setup import unmanaged
    from pinning_middleware.scope_blocks import pinning_scope

    with pinning_scope(isolated=True), use_primary(), unmanaged():
        yield


class PinningConfig(AppConfig):
    name = "pinning_middleware"
    verbose_name = "Pinning middleware"

    def ready(self) -> None:
        from pinning_middleware import checks, stats  # noqa: F401
        from pinning_middleware.backend import patches
        from pinning_middleware.stores import cache, dry_run_counts

        patches.install()
        stats.install()
        # Reads and writes of a database cache do not count as those of a user.
        cache.db_cache_context = _on_primary
        dry_run_counts.cache_context = _unmanaged
