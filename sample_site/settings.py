"""Settings of the sample site. The databases come from the environment, one URL for each:

    DATABASE_URL=postgresql://user:password@primary/board
    REPLICA1_URL=postgresql://user:password@replica1/board
    REPLICA2_URL=...

`python -m sample_site` sets them for the servers that it starts.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import dj_database_url
from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).parent
SECRET_KEY = "of the demonstration, and known to everybody"
DEBUG = os.environ.get("DEBUG") == "1"
ALLOWED_HOSTS = os.environ.get("ALLOWED_HOSTS", "127.0.0.1,localhost").split(",")


def database(url: str) -> dict[str, Any]:
    """Return the entry of DATABASES for a URL."""
    entry: dict[str, Any] = dict(dj_database_url.parse(url))
    if "postgresql" in entry["ENGINE"]:
        entry["OPTIONS"] = {"connect_timeout": 3} | entry.get("OPTIONS", {})
    return entry


if "DATABASE_URL" not in os.environ:
    raise ImproperlyConfigured(
        "Set DATABASE_URL and REPLICA1_URL, REPLICA2_URL, … or start the site with "
        "`python -m sample_site`, which runs a primary and two replicas of its own."
    )

REPLICA_URLS = {
    match[1].lower(): url
    for name, url in sorted(os.environ.items())
    if (match := re.fullmatch(r"(REPLICA\d+)_URL", name))
}
DATABASES = {"default": database(os.environ["DATABASE_URL"])} | {
    alias: database(url) | {"TEST": {"MIRROR": "default"}} for alias, url in REPLICA_URLS.items()
}

INSTALLED_APPS = [
    "sample_site.panel",  # before the admin, whose base template it extends
    "sample_site.board",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.humanize",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "pinning_middleware",
]
MIDDLEWARE = [
    "pinning_middleware.middleware.PinningMiddleware",
    "sample_site.panel.middleware.PanelMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "sample_site.policy.ContentSecurityPolicy",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
DATABASE_ROUTERS = ["pinning_middleware.routers.PinningRouter"]

PINNING_REPLICAS = list(REPLICA_URLS)
# Longer than the default of 15 s: time to open a second browser and look around.
PINNING_SECONDS = int(os.environ.get("PINNING_SECONDS", "60"))
# Longer than any lag of a demonstration; measures lag for the status page.
PINNING_MAX_LAG = 3600
PINNING_POSITIONS = os.environ.get("PINNING_POSITIONS", "1") != "0"
PINNING_STORES = [
    "pinning_middleware.stores.CookieStore",  # a browser, signed in or not
    "pinning_middleware.stores.HeaderStore",  # a script, by the header Pinning-Token
    "pinning_middleware.stores.CacheStore",  # a user, in all browsers
]
# Sessions are stored in the cache (below), so they do not depend on replicas.
PINNING_IGNORED_TABLES = ("django_session",)

SESSION_ENGINE = "django.contrib.sessions.backends.cached_db"
CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}

ROOT_URLCONF = "sample_site.urls"
WSGI_APPLICATION = "sample_site.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
STATIC_URL = "/static/"
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "board"
LOGOUT_REDIRECT_URL = "board"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    # The panel polls every second; a log line for each would hide everything else.
    "loggers": {"django.server": {"level": "ERROR"}},
}
