from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from django.apps import AppConfig, apps
from django.core.exceptions import ImproperlyConfigured


@contextmanager
def _on_primary() -> Iterator[None]:
    from pinning_middleware.api import ignore_writes, use_primary

    with use_primary(), ignore_writes():
        yield


class PinningConfig(AppConfig):
    name = "pinning_middleware"
    verbose_name = "Pinning middleware"

    was_ready: ClassVar = False

    def ready(self) -> None:
        from pinning_middleware import checks, stats  # noqa: F401
        from pinning_middleware.backend import patches
        from pinning_middleware.stores import cache

        patches.install()
        stats.install()
        # Reads and writes of a database cache do not count as those of a user.
        cache.db_cache_context = _on_primary
        PinningConfig.was_ready = True


def require_app(entry: str) -> None:
    """
    Raise ImproperlyConfigured if the app is not installed: writes would not be detected.

    ``entry`` is the name of the class that needs it. A test that removes the app from
    INSTALLED_APPS, or has ``available_apps``, does not take back what ``ready()`` has installed.
    """
    if apps.apps_ready and not (PinningConfig.was_ready or apps.is_installed(PinningConfig.name)):
        raise ImproperlyConfigured(f"{entry} requires 'pinning_middleware' in INSTALLED_APPS.")
