"""
The site: every way to write, and a read that returns what its session may have to see.

``GET /read/?user=…&list=…&list=…&reads=…`` reads the lists, once or several times. Each answer has
the highest number of each list, how many rows and different numbers it has, the owners of the rows,
the server that answered, and the seconds that this read took.
``POST /write/<how>/?to=…&number=…&…`` appends a row before it reads.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from django.db import connection, connections, transaction
from django.db.models import Count, Max
from django.db.models.expressions import RawSQL
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

from pinning_middleware import pinning_scope
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


def answer(*reads: dict[str, Any]) -> dict[str, Any]:
    return {"answers": reads}


def read(request: HttpRequest) -> HttpResponse:
    lists = request.GET.getlist("list")
    times = int(request.GET.get("reads", 1))
    return JsonResponse(answer(*(read_lists(lists) for _ in range(times))))


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
        yield json.dumps(answer(read_lists(request.GET.getlist("list")))).encode()

    return StreamingHttpResponse(body())


# A worker in the same process, which gets nothing but the token.
worker = ThreadPoolExecutor(4)


def task(request: HttpRequest) -> HttpResponse:
    """Write, and return what a task that was sent by this request sees."""
    by_orm(*row_of(request))
    token = token_to_send()
    # The task may need the last connection of a pool, for which this request waits.
    connection.close()
    job = worker.submit(run, token, request.GET.getlist("list"))
    return JsonResponse(answer(job.result(60)))


def run(token: str | None, lists: list[str]) -> dict[str, Any]:
    try:
        with pinning_scope(token, isolated=True):
            return read_lists(lists)
    finally:
        connections.close_all()


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
    path("write/<str:how>/", write),
]
