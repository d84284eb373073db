"""
The site: every way to write, and a read that returns what its session may have to see.

``GET /read/?user=…&list=…&list=…&reads=…`` reads the lists, once or several times. Each answer has
the highest number of each list, how many rows and different numbers it has, the owners of the rows,
the server that answered, and the seconds that this read took.
``POST /write/<how>/?to=…&number=…&…`` appends a row before it reads. ``after`` reads nothing, and
appends the row after the response: ``GET /written/?to=…&number=…`` returns 404 until that is done.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from django.db import connection, connections, transaction
from django.db.models import Count, Max
from django.db.models.expressions import RawSQL
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

from pinning_middleware import follow_keys, pin_keys, pinning_scope, propagate_scope
from pinning_middleware.handoff import token_to_send

from .models import Row

PORT = {"postgresql": "inet_server_port()", "mysql": "@@port"}


def user_key(request: HttpRequest) -> str | None:
    """The key under which CacheStore pins a user's other devices."""
    return request.GET.get("user")


def read_lists(lists: Iterable[str]) -> dict[str, Any]:
    """Read the lists by one statement, so that what it shows is one state of one server."""
    names, began = list(lists), time.monotonic()
    rows = (
        Row.objects.filter(list__in=names)
        .values("list", "owner")
        .annotate(
            highest=Max("number"),
            rows=Count("number"),
            numbers=Count("number", distinct=True),
            port=RawSQL(PORT[connection.vendor], ()),
        )
    )
    highest = dict.fromkeys(names, 0)
    count, distinct = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    owners: dict[str, list[str]] = {name: [] for name in names}
    server = ""
    for row in rows:
        highest[row["list"]] = max(highest[row["list"]], row["highest"])
        count[row["list"]] += row["rows"]
        distinct[row["list"]] += row["numbers"]
        owners[row["list"]].append(row["owner"])
        server = str(row["port"])
    return {
        "saw": highest,
        "rows": count,
        "numbers": distinct,
        "owners": owners,
        "server": server,
        "took": time.monotonic() - began,
    }


def answers(lists: list[str], times: int = 1) -> dict[str, Any]:
    # A task that writes pins the key of its list.
    follow_keys(*lists)
    return {"answers": [read_lists(lists) for _ in range(times)]}


def read(request: HttpRequest) -> HttpResponse:
    return JsonResponse(answers(request.GET.getlist("list"), int(request.GET.get("reads", 1))))


# Ways to write


def by_orm(name: str, number: int) -> None:
    Row.objects.create(list=name, owner=name, number=number)


def in_a_transaction(name: str, number: int) -> None:
    with transaction.atomic():
        by_orm(name, number)
        list(Row.objects.filter(list=name)[:1])


def by_a_cursor(name: str, number: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO soak_row (list, owner, number) VALUES (%s, %s, %s)", [name, name, number]
        )


def in_bulk(name: str, number: int) -> None:
    Row.objects.bulk_create([Row(list=name, owner=name, number=number)])


WRITES: dict[str, Callable[[str, int], None]] = {
    "orm": by_orm,
    "get": by_orm,
    "transaction": in_a_transaction,
    "cursor": by_a_cursor,
    "bulk": in_bulk,
}


def write(request: HttpRequest, how: str) -> HttpResponse:
    WRITES[how](*row_of(request))
    return read(request)


def row_of(request: HttpRequest) -> tuple[str, int]:
    return request.GET["to"], int(request.GET["number"])


def stream(request: HttpRequest) -> StreamingHttpResponse:
    """Write after the headers have been sent, so that no cookie can carry the pin."""

    def body() -> Iterator[bytes]:
        yield b" "
        by_orm(*row_of(request))
        yield json.dumps(answers(request.GET.getlist("list"))).encode()

    return StreamingHttpResponse(body())


# Workers in the same process, which get nothing but the token; and threads of requests.
worker = ThreadPoolExecutor(8)


def task(request: HttpRequest) -> HttpResponse:
    """Write, and return what a task that was sent by this request sees."""
    by_orm(*row_of(request))
    return JsonResponse(result_of_task(answers, request.GET.getlist("list")))


def write_by_task(request: HttpRequest) -> HttpResponse:
    """Have a task write, which pins the key of its list; return what the task sees."""
    name, number = row_of(request)
    lists = request.GET.getlist("list")

    def run() -> dict[str, Any]:
        pin_keys(name)
        by_orm(name, number)
        return answers(lists)

    return JsonResponse(result_of_task(run))


def result_of_task(run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    token = token_to_send()

    def work() -> dict[str, Any]:
        try:
            with pinning_scope(token, isolated=True):
                return run(*arguments)
        finally:
            connections.close_all()

    # The task may need the last connection of a pool, for which this request waits.
    connection.close()
    return worker.submit(work).result(60)


# Writes after the response, whose client asks whether they are done


# No read, for the client.
NOTHING_READ = json.dumps({"answers": [{}]})


class Closing(HttpResponse):
    def __init__(self) -> None:
        super().__init__(NOTHING_READ)
        self.is_closed = threading.Event()

    def close(self) -> None:
        super().close()
        self.is_closed.set()


def write_after(request: HttpRequest) -> HttpResponse:
    """Have a thread of this request write once the response has been sent."""
    response, row = Closing(), row_of(request)

    def run() -> None:
        response.is_closed.wait(60)
        status = "500"
        try:
            by_orm(*row)
            status = "200"
        finally:
            connections.close_all()
            new = status_file(*row).with_suffix(".new")
            new.write_text(status)
            new.replace(status_file(*row))

    worker.submit(propagate_scope(run))
    return response


def status_file(name: str, number: int) -> Path:
    return Path(os.environ["SOAK_WRITTEN"], f"{name}-{number}.status")


def written(request: HttpRequest) -> HttpResponse:
    found = status_file(*row_of(request))
    status = int(found.read_text()) if found.exists() else 404
    return HttpResponse(NOTHING_READ, status=status)


def objects(request: HttpRequest) -> JsonResponse:
    """Return how many objects this process has, in all and of some types, and its process ID."""
    gc.collect()
    everything = gc.get_objects()
    # The cache's client has a class of the same name.
    names = Counter(
        type(each).__name__ for each in everything if not type(each).__module__.startswith("redis")
    )
    counts = {name: names[name] for name in ("Scope", "Context", "DatabaseWrapper", "Connection")}
    return JsonResponse({"process": os.getpid(), "objects": len(everything), **counts})


urlpatterns = [
    path("objects/", objects),
    path("read/", read),
    path("write/stream/", stream),
    path("write/task/", task),
    path("write/by-task/", write_by_task),
    path("write/after/", write_after),
    path("written/", written),
    path("write/<str:how>/", write),
]
