"""
OpenTelemetry: metrics of this process, and span attributes that name the server of each read.

Add the app to the settings. The SDK may be configured before or after it::

    INSTALLED_APPS = [..., "pinning_middleware.contrib.opentelemetry"]

It requires ``opentelemetry-api`` and does nothing if that is not installed. Without an SDK, nothing
is recorded.
"""
