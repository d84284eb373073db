"""The router and the middleware need the app, since it is the app that detects writes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from django.db import router
from django.test import Client, TransactionTestCase, modify_settings, override_settings

from tests.app.models import Note
from tests.conftest import ROUTER

PROGRAM = """
import django
from django.conf import settings
from django.test import RequestFactory

settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={{
        "default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        "replica1": {{"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    }},
    INSTALLED_APPS=["django.contrib.contenttypes", {app}],
    MIDDLEWARE=["pinning_middleware.middleware.PinningMiddleware"],
    DATABASE_ROUTERS=["pinning_middleware.routers.PinningRouter"],
    PINNING_REPLICAS=["replica1"],
)
django.setup()
{code}
"""
USES = {
    "PinningRouter": "from django.db import router; router.db_for_read(object)",
    "PinningMiddleware": "from django.core.wsgi import get_wsgi_application as a; a()",
}


def run(code: str, app: str = "") -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(code=code, app=app)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("entry", USES)
def test_entry_point_without_the_app_raises_improperly_configured(entry: str) -> None:
    error = run(USES[entry]).stderr
    assert error.endswith(
        f"ImproperlyConfigured: {entry} requires 'pinning_middleware' in INSTALLED_APPS.\n"
    )


@pytest.mark.parametrize("entry", USES)
@pytest.mark.parametrize("app", ["pinning_middleware", "pinning_middleware.apps.PinningConfig"])
def test_entry_point_with_the_app_works(entry: str, app: str) -> None:
    assert run(USES[entry], repr(app)).returncode == 0


@pytest.mark.django_db(databases="__all__")
def test_override_that_removes_the_app_leaves_router_and_middleware_working() -> None:
    with (
        modify_settings(INSTALLED_APPS={"remove": "pinning_middleware"}),
        override_settings(DATABASE_ROUTERS=[ROUTER]),
    ):
        assert router.db_for_read(Note) in {"replica1", "replica2"}
        Client().get("/")


class AvailableAppsTests(TransactionTestCase):
    """Django's own tests, and those of some packages, limit the apps."""

    available_apps = ("tests.app",)

    def test_router_that_is_made_while_apps_are_limited_works(self) -> None:
        with override_settings(DATABASE_ROUTERS=[ROUTER]):
            assert router.db_for_read(Note) in {"replica1", "replica2"}
