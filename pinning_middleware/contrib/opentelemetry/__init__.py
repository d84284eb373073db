"""
OpenTelemetry: metrics of what this process did and knows, and on spans who answered.

One line in the settings, wherever the SDK is configured, before or after it::

    INSTALLED_APPS = [..., "pinning_middleware.contrib.opentelemetry"]

It needs the package ``opentelemetry-api``, and does nothing where that is not installed. Without an
SDK nothing is counted or kept.
"""
