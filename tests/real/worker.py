"""A Celery app, `celery -A tests.real.worker worker`, and its tasks."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from django.conf import settings
from django.db import connections, router

from pinning_middleware.celery import propagate_pins

from .ports import PORT_QUERY

app = Celery("tests.real.worker")
app.conf.update(
    broker_url=os.environ.get("WORKER_BROKER"),
    result_backend=os.environ.get("WORKER_BROKER"),
    broker_connection_retry_on_startup=True,
    task_track_started=True,
    worker_hijack_root_logger=False,
)
if os.environ.get("WORKER_CARRIES", "1") == "1":
    propagate_pins(app)


class OnServers:
    def db_for_read(self, model: Any, **hints: Any) -> str:
        return settings.PRIMARY  # type: ignore[no-any-return]

    db_for_write = db_for_read


def look(*titles: str) -> dict[str, Any]:
    """Return whether these titles exist, and the port of the server."""
    from tests.app.models import Book

    seen = Book.objects.filter(title__in=titles).count() == len(titles)
    (row,) = Book.objects.raw(PORT_QUERY[connections[router.db_for_write(Book)].vendor])
    return {"seen": seen, "port": row.port}


@app.task
def see(*titles: str) -> dict[str, Any]:
    return look(*titles)


@app.task(pinning="primary")
def see_on_primary(*titles: str) -> dict[str, Any]:
    return look(*titles)


@app.task(pinning="wait", pinning_wait=60)
def see_when_there(*titles: str) -> dict[str, Any]:
    return look(*titles)


@app.task(pinning="wait", pinning_wait=0.05)
def see_soon(*titles: str) -> dict[str, Any]:
    return look(*titles)


@app.task(pinning="retry", pinning_retries=20, max_retries=0)
def see_by_retry(*titles: str) -> dict[str, Any]:
    request = see_by_retry.request
    requeued = request.get("pinning_requeued")
    return {**look(*titles), "requeued": requeued, "retries": request.retries}


@app.task(pinning="retry", pinning_retries=1, max_retries=0)
def see_by_one_retry(*titles: str) -> dict[str, Any]:
    from pinning_middleware.stats import get_stats

    retries = see_by_one_retry.request.get("pinning_requeued")
    return {**look(*titles), "requeued": retries, "stats": get_stats()["task_retries"]}


@app.task
def add(title: str) -> str:
    from tests.app.models import Book

    Book.objects.create(title=title)
    return title


@app.task
def see_all(results: list[str], *titles: str) -> dict[str, Any]:
    return look(*results, *titles)


@app.task
def same(value: Any) -> Any:
    return value


@app.task(bind=True, max_retries=1)
def try_twice(self: Any, title: str) -> dict[str, Any]:
    """Read on each of two attempts; the first one also writes."""
    if self.request.retries == 0:
        assert look(title)["seen"]
        add(f"{title} again")
        raise self.retry(countdown=0)
    return look(title, f"{title} again")


@app.task
def add_and_fail(title: str) -> None:
    add(title)
    raise LookupError(title)


@app.task
def pass_on(title: str) -> str:
    """Send a task from a task, and return its ID."""
    return str(see.delay(title).id)
