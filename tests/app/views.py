"""Two views that do what a test puts into ``actions``, in a sync and in an async way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asgiref.sync import sync_to_async
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

actions: dict[str, Callable[[HttpRequest], Any]] = {}


def _respond(result: Any) -> HttpResponseBase:
    return result if isinstance(result, HttpResponseBase) else HttpResponse(str(result))


def sync_view(request: HttpRequest, does: str) -> HttpResponseBase:
    return _respond(actions[does](request))


async def async_view(request: HttpRequest, does: str) -> HttpResponseBase:
    return _respond(await sync_to_async(actions[does])(request))
