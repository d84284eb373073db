"""Write a number, read it back, and say which server it was read from."""

from __future__ import annotations

from django.db.models.expressions import RawSQL
from django.http import HttpRequest, HttpResponse
from django.urls import path

from .models import Entry


def entry(request: HttpRequest, client: str) -> HttpResponse:
    if request.method == "POST":
        number = int(request.body)
        Entry.objects.update_or_create(client=client, defaults={"number": number})
        return HttpResponse(status=204)
    entries = Entry.objects.filter(client=client)
    row = entries.annotate(port=RawSQL("inet_server_port()", ())).values_list("number", "port")
    return HttpResponse("{} {}".format(*(row.first() or (0, 0))))


urlpatterns = [path("<str:client>/", entry)]
