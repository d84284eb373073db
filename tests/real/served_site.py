"""A site that writes and reads, by sync and by async views; run by `test_servers.py`."""

from __future__ import annotations

from asgiref.sync import sync_to_async
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

wsgi, asgi = get_wsgi_application(), get_asgi_application()

from pinning_middleware import is_pinned  # noqa: E402
from tests.app.models import Book  # noqa: E402


def port() -> int:
    """Return the port of the server of this request's reads."""
    (book,) = Book.objects.raw("SELECT 1 AS id, inet_server_port() AS port")
    return int(book.port)


def write(request: HttpRequest, title: str) -> JsonResponse:
    Book.objects.create(title=title)
    return JsonResponse({"found": Book.objects.filter(title=title).exists(), "port": port()})


def read(request: HttpRequest, title: str) -> JsonResponse:
    return JsonResponse({"found": Book.objects.filter(title=title).exists(), "port": port()})


async def awrite(request: HttpRequest, title: str) -> JsonResponse:
    await Book.objects.acreate(title=title)
    found = await Book.objects.filter(title=title).aexists()
    return JsonResponse({"found": found, "port": await sync_to_async(port)()})


async def aread(request: HttpRequest, title: str) -> JsonResponse:
    found = [book.title async for book in Book.objects.filter(title=title)] == [title]
    return JsonResponse({"found": found, "port": await sync_to_async(port)()})


# What closers of responses found: whether the request was pinned, and the port of their reads.
closed: list[tuple[bool, int]] = []


def write_and_close(request: HttpRequest, title: str) -> JsonResponse:
    response = write(request, title)
    response._resource_closers.append(lambda: closed.append((is_pinned(), port())))
    return response


async def awrite_and_close(request: HttpRequest, title: str) -> JsonResponse:
    return await sync_to_async(write_and_close)(request, title)


def list_closed(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"closed": closed})


urlpatterns = [
    path("sync/close/<title>/", write_and_close),
    path("async/close/<title>/", awrite_and_close),
    path("closed/", list_closed),
    path("sync/write/<title>/", write),
    path("sync/read/<title>/", read),
    path("async/write/<title>/", awrite),
    path("async/read/<title>/", aread),
]
