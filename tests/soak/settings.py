"""Settings of the site under test; what differs between runs comes from the environment."""

from __future__ import annotations

import json
import os

ALLOWED_HOSTS = ["*"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["pinning_middleware", "tests.soak"]
MIDDLEWARE = ["pinning_middleware.middleware.PinningMiddleware"]
DATABASE_ROUTERS = ["pinning_middleware.routers.PinningRouter"]
PINNING_STORES = [
    "pinning_middleware.stores.CookieStore",
    "pinning_middleware.stores.CacheStore",
]
PINNING_USER_KEY = "tests.soak.site.user_key"
# A cache that has failed is used again within the aftermath of its fault.
PINNING_RETRY_AFTER = 1
ROOT_URLCONF = "tests.soak.site"
SECRET_KEY = "only for tests"
USE_TZ = True
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler", "level": "ERROR"}},
    "root": {"handlers": ["console"], "level": "ERROR"},
    # Each request that fails is recorded by its client.
    "loggers": {"django.request": {"handlers": ["console"], "propagate": False}},
}

# DATABASES, PINNING_REPLICAS, CACHES and whatever the layout needs.
globals().update(json.loads(os.environ["SOAK_SETTINGS"]))
