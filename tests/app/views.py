"""A sync and an async view that run the actions in ``actions``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

actions: dict[str, Callable[[HttpRequest], Any]] = {}


def _respond(result: Any) -> HttpResponseBase:
    return result if isinstance(result, HttpResponseBase) else HttpResponse(str(result))


def sync_view(request: HttpRequest, does: str) -> HttpResponseBase:
    action = actions[does]
    return _respond((async_to_sync(action) if iscoroutinefunction(action) else action)(request))


async def async_view(request: HttpRequest, does: str) -> HttpResponseBase:
    action = actions[does]
    return _respond(
        await (action if iscoroutinefunction(action) else sync_to_async(action))(request)
    )


@transaction.non_atomic_requests
def non_atomic_view(request: HttpRequest, does: str) -> HttpResponseBase:
    return sync_view(request, does)
