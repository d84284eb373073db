"""Settings of the site that `test_panel.py` opens in a browser: with the debug toolbar."""

from __future__ import annotations

from typing import Any

from .served_settings import *  # noqa: F403
from .served_settings import INSTALLED_APPS as _APPS

DEBUG = True
DEBUG_TOOLBAR_PANELS = [
    "debug_toolbar.panels.history.HistoryPanel",
    "debug_toolbar.panels.sql.SQLPanel",
    "pinning_middleware.panels.PinningPanel",
]
INSTALLED_APPS = [*_APPS, "django.contrib.staticfiles", "debug_toolbar"]
INTERNAL_IPS = ["127.0.0.1"]
MIDDLEWARE = [
    "pinning_middleware.middleware.PinningMiddleware",
    "debug_toolbar.middleware.DebugToolbarMiddleware",
]
PINNING_MAX_LAG = 3600
PINNING_SECONDS = 60
ROOT_URLCONF = "tests.real.panel_site"
STATIC_URL = "static/"
TEMPLATES: list[dict[str, Any]] = [
    {"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}
]
