from __future__ import annotations

from django.apps import AppConfig

from . import generic, writes


class PinningConfig(AppConfig):
    name = "pinning_middleware"
    verbose_name = "Pinning middleware"

    def ready(self) -> None:
        from . import checks  # noqa: F401

        writes.install()
        generic.install()
