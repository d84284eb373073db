"""One small site; its databases come from the environment."""

from __future__ import annotations

import json
import os

NOWHERE = {
    alias: {"ENGINE": "django.db.backends.sqlite3", "NAME": f"/nowhere/{alias}"}
    for alias in ("default", "replica1", "replica2")
}
ALLOWED_HOSTS = ["*"]
DATABASES = json.loads(os.environ.get("BENCHMARK_DATABASES", "null")) or NOWHERE
DATABASE_ROUTERS = ["pinning_middleware.routers.PinningRouter"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["pinning_middleware", "benchmarks"]
MIDDLEWARE = ["pinning_middleware.middleware.PinningMiddleware"]
PINNING_REPLICAS = ["replica1", "replica2"]
REPLICA_DATABASES = ["replica1", "replica2"]
ROOT_URLCONF = "benchmarks.site"
SECRET_KEY = "only for benchmarks"
USE_TZ = True
