"""The middleware and the settings helpers of ``multidb.middleware``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async

from pinning_middleware.api import pin_this_request
from pinning_middleware.conf import conf
from pinning_middleware.contrib.multidb.pinning import pin_this_thread, unpin_this_thread
from pinning_middleware.middleware import PinningMiddleware
from pinning_middleware.pins import Pin, PinKey
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.scope import current_scope, enter
from pinning_middleware.stores.token_stores import MULTIDB_VALUE
from pinning_middleware.utils import clock

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

__all__ = [
    "READ_ONLY_METHODS",
    "PinningRouterMiddleware",
    "pin_this_thread",
    "pinning_cookie",
    "pinning_cookie_httponly",
    "pinning_cookie_samesite",
    "pinning_cookie_secure",
    "pinning_seconds",
    "unpin_this_thread",
]

READ_ONLY_METHODS = frozenset({"GET", "TRACE", "HEAD", "OPTIONS"})


def pinning_cookie() -> str:
    return conf.cookie_name


def pinning_cookie_httponly() -> bool:
    return bool(conf.cookie["httponly"])


def pinning_cookie_samesite() -> Any:
    return conf.cookie["samesite"]


def pinning_cookie_secure() -> bool:
    return bool(conf.cookie["secure"])


def pinning_seconds() -> int:
    return int(conf.seconds)


class PinningRouterMiddleware(PinningMiddleware):
    """
    ``PinningMiddleware`` that also accepts the cookie of a process that still runs
    django-multidb-router, and pins the client of a response with ``_db_write``.

    A subclass may override ``process_request`` and ``process_response``, as it could there. If a
    site's tests call them directly, they open a scope and save its pins.
    """

    def process_request(self, request: HttpRequest) -> HttpResponseBase | None:
        """Inherit the pin of a cookie without a position or an end."""
        if not conf.enabled:
            return None
        if not _is_inside(request):
            # No code has left the scope of the previous request.
            enter(None)
            self.load_pins(self.open_scope(request), request, conf.stores_at_start)
        if request.COOKIES.get(conf.cookie_name) == MULTIDB_VALUE:
            # The legacy cookie contains no time: the write may have just ended.
            pin = Pin(clock.now() + conf.seconds)
            current_scope().inherit({PinKey(alias): pin for alias in pools().by_primary})
        return None

    def process_response(
        self, request: HttpRequest, response: HttpResponseBase
    ) -> HttpResponseBase:
        """Pin the client of a response that the code has marked."""
        if not conf.enabled:
            return response
        if getattr(response, "_db_write", False):
            pin_this_request()
        if not _is_inside(request):
            self.save_pins(current_scope(), request, response)
        return response

    def respond(self, request: HttpRequest) -> Any:
        """Return the response, between the two hooks that a subclass may override."""
        request._pinning_is_inside = True  # type: ignore[attr-defined]
        response = self.process_request(request)
        if response is None:
            response = super().respond(request)
        return self.process_response(request, response)

    async def arespond(self, request: HttpRequest) -> Any:
        """Async version of ``respond()``."""
        request._pinning_is_inside = True  # type: ignore[attr-defined]
        response = await self._ahook("process_request", request)
        if response is None:
            response = await super().arespond(request)
        return await self._ahook("process_response", request, response)

    async def _ahook(self, name: str, *args: Any) -> Any:
        hook = getattr(self, name)
        if getattr(type(self), name) is getattr(PinningRouterMiddleware, name):
            return hook(*args)
        # The hooks of a subclass may run sync-only code.
        return await sync_to_async(hook)(*args)


def _is_inside(request: HttpRequest) -> bool:
    """Return whether ``__call__`` has opened the scope that this request is in."""
    return hasattr(request, "_pinning_is_inside")
