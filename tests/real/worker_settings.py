"""Settings of the workers: the databases of the process that starts them."""

from __future__ import annotations

import json
import os

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES, INSTALLED_APPS

# The SQLite files of the tests cannot be used by another process.
DATABASES = {"default": {"ENGINE": DATABASES["default"]["ENGINE"], "NAME": ":memory:"}}
_servers = json.loads(os.environ["WORKER_DATABASES"])
DATABASES |= _servers
# The primary comes first.
PRIMARY, *_replicas = _servers
DATABASE_ROUTERS = ["pinning_middleware.routers.PinningRouter", "tests.real.worker.OnServers"]
PINNING_REPLICAS = {PRIMARY: _replicas}
PINNING_SECONDS = 600

# For Django's tasks only. The queue is read from the primary, since its worker opens a transaction
# on the read database and locks rows on the write database.
if "WORKER_CACHE" in os.environ:
    PINNING_PRIMARY_MODELS = ["django_tasks_database"]
    # The worker's update of the queue must not pin the task.
    PINNING_IGNORED_TABLES = ["django_tasks_database_dbtaskresult"]
    INSTALLED_APPS += ["django_tasks_db", "tests.real.queued.Queued"]
    TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
    CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": os.environ["WORKER_CACHE"],
        }
    }
