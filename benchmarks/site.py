"""Write a number, and read it back with the port of the server that served the read."""

from __future__ import annotations

from typing import Any

from django.db.models.expressions import RawSQL
from django.http import HttpRequest, HttpResponse
from django.urls import path

from .models import Entry


def entry(request: HttpRequest, client: str) -> HttpResponse:
    if request.method == "POST":
        number = int(request.body)
        Entry.objects.update_or_create(client=client, defaults={"number": number})
        return HttpResponse(status=204)
    return _response(_entries(client).first())


async def entry_async(request: HttpRequest, client: str) -> HttpResponse:
    if request.method == "POST":
        number = int(request.body)
        await Entry.objects.aupdate_or_create(client=client, defaults={"number": number})
        return HttpResponse(status=204)
    return _response(await _entries(client).afirst())


def _entries(client: str) -> Any:
    entries = Entry.objects.filter(client=client)
    return entries.annotate(port=RawSQL("inet_server_port()", ())).values_list("number", "port")


def _response(row: tuple[int, int] | None) -> HttpResponse:
    return HttpResponse("{} {}".format(*(row or (0, 0))))


def one(request: HttpRequest) -> HttpResponse:
    """Run one query: a read, or a write."""
    if request.method == "POST":
        Entry.objects.create(client=request.META["QUERY_STRING"], number=1)
        return HttpResponse(status=204)
    return HttpResponse(str(Entry.objects.get(pk=1)))


def work(request: HttpRequest) -> HttpResponse:
    """Run a read that takes 0.1 s without using the processor."""
    slow = Entry.objects.annotate(slept=RawSQL("pg_sleep(0.1)::text", ()))
    return HttpResponse(str(slow.filter(client="first").get()))


urlpatterns = [
    path("work/", work),
    path("one/", one),
    path("async/<str:client>/", entry_async),
    path("<str:client>/", entry),
]
