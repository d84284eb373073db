"""Write a number, read it back, and say which server it was read from."""

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
    return _said(_seen(client).first())


async def entry_async(request: HttpRequest, client: str) -> HttpResponse:
    if request.method == "POST":
        number = int(request.body)
        await Entry.objects.aupdate_or_create(client=client, defaults={"number": number})
        return HttpResponse(status=204)
    return _said(await _seen(client).afirst())


def _seen(client: str) -> Any:
    entries = Entry.objects.filter(client=client)
    return entries.annotate(port=RawSQL("inet_server_port()", ())).values_list("number", "port")


def _said(row: tuple[int, int] | None) -> HttpResponse:
    return HttpResponse("{} {}".format(*(row or (0, 0))))


def one(request: HttpRequest) -> HttpResponse:
    """Do as little as a request with a database can: one read, or one write."""
    if request.method == "POST":
        Entry.objects.create(client=request.META["QUERY_STRING"], number=1)
        return HttpResponse(status=204)
    return HttpResponse(str(Entry.objects.get(pk=1)))


urlpatterns = [
    path("one/", one),
    path("async/<str:client>/", entry_async),
    path("<str:client>/", entry),
]
