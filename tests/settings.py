from __future__ import annotations

import os
import tempfile
from pathlib import Path

# The replicas are not connected to their primary, so they lag forever and never have its writes.
FOLDER = Path(tempfile.gettempdir()) / f"pinning-tests-{os.getuid()}-{os.getpid()}"


def sqlite(alias: str) -> dict[str, object]:
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(FOLDER / f"{alias}.sqlite3"),
        "TEST": {"NAME": str(FOLDER / f"test_{alias}.sqlite3")},
    }


ALIASES = ["default", "replica1", "replica2", "users", "users_replica", "slave", "elsewhere"]
DATABASES = {alias: sqlite(alias) for alias in ALIASES}
DATABASE_ROUTERS = ["pinning_middleware.routers.PinningRouter"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django.contrib.sessions",
    "pinning_middleware",
    "tests.app",
]
MIDDLEWARE = [
    "pinning_middleware.middleware.PinningMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
PINNING_REPLICAS = ["replica1", "replica2"]
ROOT_URLCONF = "tests.app.urls"
SECRET_KEY = "only for tests"
USE_TZ = True
