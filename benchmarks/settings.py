"""One small site; its databases come from the environment."""

from __future__ import annotations

import os

import dj_database_url

ALIASES = {"default": "DATABASE_URL", "replica1": "REPLICA1_URL", "replica2": "REPLICA2_URL"}
DATABASES = {
    alias: dj_database_url.parse(
        os.environ.get(name, f"sqlite:////nowhere/{alias}"), conn_max_age=None
    )
    for alias, name in ALIASES.items()
}
DATABASE_ROUTERS = ["pinning_middleware.routers.PinningRouter"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["pinning_middleware", "benchmarks"]
MIDDLEWARE = ["pinning_middleware.middleware.PinningMiddleware"]
PINNING_REPLICAS = ["replica1", "replica2"]
REPLICA_DATABASES = ["replica1", "replica2"]
ROOT_URLCONF = "benchmarks.site"
SECRET_KEY = "only for benchmarks"
USE_TZ = True
