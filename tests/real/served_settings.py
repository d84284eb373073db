"""Settings of the site that `test_servers.py` runs under real servers."""

from __future__ import annotations

import json
import os

DATABASES = json.loads(os.environ["SERVED_DATABASES"])
DATABASE_ROUTERS = ["pinning_middleware.routers.PinningRouter"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "pinning_middleware",
    "tests.app",
]
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"]},
}
MIDDLEWARE = ["pinning_middleware.middleware.PinningMiddleware"]
PINNING_REPLICAS = ["replica1", "replica2"]
PINNING_RETRY_AFTER = 0.2
ROOT_URLCONF = "tests.real.served_site"
SECRET_KEY = "only for tests"
USE_TZ = True
