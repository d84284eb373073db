"""
A small site of another package, or with a custom router, run by a test with settings from its
command line: it prints the results of its users, and the messages of the system checks.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import threading
from typing import Any

import django
from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import path

REPLICAS = ["replica1", "replica2"]


class RandomRouter:
    """The router of most tutorials."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return random.choice(REPLICAS)

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "default"

    def allow_relation(self, obj1: Any, obj2: Any, **hints: Any) -> bool:
        return True

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:
        return db == "default"


class StickyRouter(RandomRouter):
    """The same site after a fix for a user who missed their own write."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "default" if getattr(_thread, "is_sticky", False) else random.choice(REPLICAS)


class StickyMiddleware:
    """The middleware for that router."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        is_post = request.method == "POST"
        _thread.is_sticky = is_post or "sticky" in request.COOKIES
        response: HttpResponse = self.get_response(request)
        if is_post:
            response.set_cookie("sticky", "1", max_age=10)
        return response


_thread = threading.local()


def index(request: HttpRequest) -> HttpResponse:
    from django.contrib.auth.models import Group

    if request.method == "POST":
        Group.objects.create(name=request.POST["name"])
        return HttpResponseRedirect("/", headers={"X-Found": found()})
    return HttpResponse(found())


def found() -> str:
    """Return the role of the server that is read, and its rows."""
    from django.contrib.auth.models import Group

    groups = Group.objects.order_by("name")
    kind = "primary" if groups.db == "default" else "replica"
    return f"{kind}: {','.join(groups.values_list('name', flat=True))}"


urlpatterns = [path("", index)]


def visit() -> dict[str, Any]:
    """Return the results of the steps of two users."""
    from django.core.checks import run_checks
    from django.test import Client

    writer, other = Client(), Client()
    before = get(writer)
    response: Any = writer.post("/", {"name": "new"})
    steps = {
        "before": before,
        "write": f"{response.status_code} {response.headers['X-Found']}",
        "redirected": get(writer, response.url),
        "other": get(other),
        "cookies": sorted(writer.cookies),
    }
    writer.cookies.clear()
    steps["without the cookie"] = get(writer)
    messages = [[str(one.id)[-4:], one.msg, str(one.hint)] for one in run_checks(tags=["pinning"])]
    return {"steps": steps, "checks": messages}


def get(client: Any, address: str = "/") -> str:
    return str(client.get(address).content.decode())


if __name__ == "__main__":
    settings.configure(ROOT_URLCONF=__name__, **json.loads(sys.argv[1]))
    # The name by which the settings refer to this module.
    sys.modules["tests.contrib.legacy_site"] = sys.modules[__name__]
    django.setup()
    from django.core.management import call_command
    from django.db import connections

    call_command("migrate", verbosity=0)
    connections.close_all()
    for alias in REPLICAS:
        shutil.copy(settings.DATABASES["default"]["NAME"], settings.DATABASES[alias]["NAME"])
    print(json.dumps(visit()))
