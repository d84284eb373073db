"""Settings of the workers that the tests start: the databases of the process before them."""

from __future__ import annotations

import json
import os

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES, INSTALLED_APPS

# The tests' own SQLite files are not for another process.
DATABASES = {"default": {"ENGINE": DATABASES["default"]["ENGINE"], "NAME": ":memory:"}}
DATABASES |= json.loads(os.environ["WORKER_DATABASES"])
DATABASE_ROUTERS = ["pinning_middleware.routers.PinningRouter", "tests.real.worker.OnPostgreSQL"]
PINNING_REPLICAS = {"pg": ["pg1", "pg2"]}
PINNING_SECONDS = 600

# For Django's tasks only. The queue is asked for on the primary, as its worker opens a transaction
# where reads go and locks where writes go.
if "WORKER_CACHE" in os.environ:
    DATABASE_ROUTERS.insert(0, "tests.real.worker.QueueOnPrimary")
    # That a worker took a task is nothing that the task has to see.
    PINNING_IGNORED_TABLES = ["django_tasks_database_dbtaskresult"]
    INSTALLED_APPS += ["django_tasks_db", "tests.real.queued.Queued"]
    TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
    CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": os.environ["WORKER_CACHE"],
        }
    }
