"""A site set up like in the README; the environment selects the databases."""

import json
import os

DATABASES = json.loads(os.environ["PROJECT_DATABASES"])
DATABASE_ROUTERS = ["pinning_middleware.routers.PinningRouter"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.staticfiles",
    "pinning_middleware",
    "comments",
]
MIDDLEWARE = ["pinning_middleware.middleware.PinningMiddleware"]
PINNING_REPLICAS = ["replica1", "replica2"]
ROOT_URLCONF = "comments.urls"
SECRET_KEY = "only for tests"
STATIC_URL = "static/"
USE_TZ = True
