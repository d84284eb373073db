"""Beside django-prometheus, whose backends wrap cursors: each counts a read once."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import django
import pytest
from django.db import connections
from django.db.utils import load_backend
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import include, path
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider

from pinning_middleware.contrib.opentelemetry.instruments import Instruments
from pinning_middleware.scopes.scope import enter
from tests.app.models import Book
from tests.conftest import Browser, is_replica
from tests.settings import INSTALLED_APPS, MIDDLEWARE

from .pages import DOCS, blocks

if django.VERSION >= (6, 1):
    pytest.skip("django-prometheus refuses Django 6.1", allow_module_level=True)

pytestmark = [
    pytest.mark.django_db(transaction=True, databases="__all__"),
    pytest.mark.urls(__name__),
]

ENGINE = "django_prometheus.db.backends.sqlite3"
ALIASES = ("default", "replica1", "replica2")
SETTINGS: dict[str, Any] = {
    "INSTALLED_APPS": [*INSTALLED_APPS, "django_prometheus"],
    "MIDDLEWARE": [
        MIDDLEWARE[0],
        "django_prometheus.middleware.PrometheusBeforeMiddleware",
        *MIDDLEWARE[1:],
        "django_prometheus.middleware.PrometheusAfterMiddleware",
    ],
    "PROMETHEUS_EXPORT_MIGRATIONS": False,
}
# A line of the exported text.
LINE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def view(request: HttpRequest) -> HttpResponse:
    list(Book.objects.all())
    list(Book.objects.all())
    Book.objects.create(title="new")
    list(Book.objects.all())
    return HttpResponse("done")


urlpatterns = [path("", include("django_prometheus.urls")), path("view/", view)]


@pytest.fixture(autouse=True)
def its_backends() -> Iterator[None]:
    """Use the backends of django-prometheus for the aliases, with the same registry."""
    kept = {alias: (connections[alias], connections.settings[alias]["ENGINE"]) for alias in ALIASES}
    for alias in ALIASES:
        connections.settings[alias]["ENGINE"] = ENGINE
        del connections[alias]
    provider = MeterProvider(metric_readers=[PrometheusMetricReader()])
    instruments = Instruments(provider)
    instruments.start()
    with override_settings(**SETTINGS):
        enter(None)
        yield
    instruments.stop()
    provider.shutdown()
    for alias, (connection, engine) in kept.items():
        connections[alias].close()
        connections.settings[alias]["ENGINE"] = engine
        connections[alias] = connection


class Counted(dict[str, dict[str, float]]):
    """Return the exported sum of each metric and alias."""

    def __init__(self, text: str) -> None:
        super().__init__()
        for name, labels, value in LINE.findall(text):
            found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            by_alias = self.setdefault(name, {})
            alias = found.get("alias", "")
            by_alias[alias] = by_alias.get(alias, 0.0) + float(value)

    def since(self, before: Counted, name: str) -> dict[str, float]:
        known = before.get(name, {})
        found = {alias: n - known.get(alias, 0.0) for alias, n in self.get(name, {}).items()}
        return {alias: number for alias, number in found.items() if number}


def test_read_is_counted_once_by_each_package(browser: Browser) -> None:
    def collected() -> Counted:
        return Counted(browser.get("/metrics").content.decode())

    assert type(connections["replica1"]).__module__.startswith("django_prometheus")
    before = collected()
    assert browser.get("/view/").status_code == 200
    after = collected()
    executed = after.since(before, "django_db_execute_total")
    reads = after.since(before, "pinning_middleware_reads_total")
    (replica,) = (alias for alias in executed if is_replica(alias))
    # A write and the read that follows it on the primary, and two reads on a replica.
    assert executed == {"default": 2, replica: 2}
    assert reads == {"default": 1, replica: 2}


def test_backends_are_documented() -> None:
    page = [
        each
        for each in blocks(DOCS / "how-to/integrations.md")
        if each.heading == "django-prometheus"
    ]
    settings = next(each for each in page if not each.file).run()
    for entry in settings.DATABASES.values():
        assert load_backend(entry["ENGINE"]).DatabaseWrapper.vendor == "postgresql"


def test_documented_provider() -> None:
    """In a subprocess, because providers can be set only once."""
    page = [each for each in blocks(DOCS / "how-to/integrations.md") if each.file == "shop/metrics"]
    assert len(page) == 1
    code = (
        "from tests.contrib.pages import DOCS, blocks\n"
        "page = blocks(DOCS / 'how-to/integrations.md')\n"
        "next(block for block in page if block.file == 'shop/metrics').run()\n"
        "from opentelemetry.metrics import get_meter\n"
        "get_meter('test').create_counter('seen').add(1)\n"
        "from prometheus_client import generate_latest\n"
        "print(b'seen_total' in generate_latest())"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent)
    assert ran.stdout.strip() == "True", ran.stderr
