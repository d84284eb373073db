"""
The time of a GET without and with PINNING_RETRY_404, and of one whose view is run twice, on
databases of SQLite in memory. The replica has none of the rows.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import django

from . import settings

DATABASE = {"ENGINE": "django.db.backends.sqlite3"}
settings.DATABASES = {
    alias: {**DATABASE, "NAME": f"file:{alias}?mode=memory"} for alias in ("default", "replica1")
}
settings.PINNING_REPLICAS = ["replica1"]
settings.ROOT_URLCONF = __name__
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.settings")
django.setup()

from django.core.handlers.wsgi import WSGIHandler  # noqa: E402
from django.db import connections  # noqa: E402
from django.http import Http404, HttpResponse  # noqa: E402
from django.test import RequestFactory, override_settings  # noqa: E402
from django.urls import path  # noqa: E402

from .measure import fastest  # noqa: E402
from .models import Entry  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "40"))
TIMES = 100


def read(request: Any) -> HttpResponse:
    return HttpResponse(Entry.objects.filter(pk=1).exists())


def find(request: Any) -> HttpResponse:
    if not Entry.objects.filter(pk=1).exists():
        raise Http404
    return HttpResponse()


urlpatterns = [path("read", read), path("find", find)]


def main() -> None:
    no_replicas = override_settings(PINNING_REPLICAS=[])
    for alias in settings.DATABASES:
        with no_replicas, connections[alias].schema_editor() as editor:
            editor.create_model(Entry)
    Entry.objects.using("default").create(pk=1, client="one", number=1)
    handler: Any = WSGIHandler()

    def visit(address: str, status: int) -> Callable[[], None]:
        environ = RequestFactory().get(address).environ

        def run() -> None:
            response = handler(environ.copy(), lambda status, headers: None)
            response.close()
            assert response.status_code == status

        return run

    kinds = {
        "a GET that reads a replica": (visit("/read", 200), False),
        "the same with PINNING_RETRY_404": (visit("/read", 200), 1.0),
        "a GET that ends in 404": (visit("/find", 404), False),
        "the same, run again on the primary": (visit("/find", 200), 1.0),
    }
    took: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, (run, share) in kinds.items():
            with override_settings(PINNING_RETRY_404=share):
                run()
                took[name].append(fastest(run, TIMES))
    for name, seconds in took.items():
        print(f"{name:36}{statistics.median(seconds) * 1e6:8.1f} µs")


if __name__ == "__main__":
    main()
