"""
A small site of django-multidb-router, run by a test with settings from its command line: it says
what its visitors found.
"""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import django
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.urls import path


def index(request: HttpRequest) -> HttpResponse:
    from django.contrib.auth.models import Group

    if request.method == "POST":
        Group.objects.create(name=request.POST["name"])
    names = ",".join(Group.objects.order_by("name").values_list("name", flat=True))
    return HttpResponse(f"{Group.objects.all().db}:{names}")


urlpatterns = [path("", index)]


def visit() -> dict[str, Any]:
    """Return what each step of two visitors found."""
    from django.test import Client

    writer, other = Client(), Client()
    found = {
        "before": get(writer),
        "write": post(writer),
        "after": get(writer),
        "other": get(other),
        "cookies": sorted(writer.cookies),
    }
    writer.cookies.clear()
    return {**found, "without the cookie": get(writer)}


def get(client: Any) -> str:
    return str(client.get("/").content.decode())


def post(client: Any) -> str:
    return str(client.post("/", {"name": "new"}).content.decode())


if __name__ == "__main__":
    settings.configure(ROOT_URLCONF=__name__, **json.loads(sys.argv[1]))
    django.setup()
    from django.core.management import call_command
    from django.db import connections

    call_command("migrate", verbosity=0)
    connections.close_all()
    for alias in settings.REPLICA_DATABASES:
        shutil.copy(settings.DATABASES["default"]["NAME"], settings.DATABASES[alias]["NAME"])
    print(json.dumps(visit()))
