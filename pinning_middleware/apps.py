from __future__ import annotations

from django.apps import AppConfig

from . import failover, generic, writes


class PinningConfig(AppConfig):
    name = "pinning_middleware"
    verbose_name = "Pinning middleware"

    def ready(self) -> None:
        from . import checks  # noqa: F401

        # The guard last, so that it is outermost and sees what is tried before all others do.
        failover.install()
        writes.install()
        generic.install()
