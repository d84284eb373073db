from __future__ import annotations

from django.apps import AppConfig


class OpenTelemetryConfig(AppConfig):
    name = "pinning_middleware.contrib.opentelemetry"
    label = "pinning_opentelemetry"
    verbose_name = "Pinning middleware: OpenTelemetry"

    def ready(self) -> None:
        try:
            import opentelemetry.metrics
            import opentelemetry.trace  # noqa: F401
        except ModuleNotFoundError:
            # Optional, so that machines without it can share INSTALLED_APPS.
            return
        from pinning_middleware.contrib.opentelemetry.instruments import instrument

        instrument()
