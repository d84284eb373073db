"""The middleware by its older name, and what it told of its settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction, sync_to_async

from pinning_middleware.api import pin_this_request
from pinning_middleware.conf import conf
from pinning_middleware.contrib.multidb.pinning import pin_this_thread, unpin_this_thread
from pinning_middleware.middleware import PinningMiddleware
from pinning_middleware.pins import Pin
from pinning_middleware.routing.outgoing import outgoing_pins
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.scope import Scope, current_scope, enter

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
# What the older package's cookie says.
_YES = "y"


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
    ``PinningMiddleware``, which also honours the cookie of a process that still runs the older
    package and pins who gets a response with ``_db_write``.

    A subclass may override ``process_request`` and ``process_response``, as it could there. Called
    by themselves, as a site's own tests may do, they begin a scope and save its pins.
    """

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        is_async = iscoroutinefunction(get_response)
        self._inner = get_response
        super().__init__(self._arespond if is_async else self._respond)

    def process_request(self, request: HttpRequest) -> HttpResponseBase | None:
        """Take up the pin of a cookie without a position or an end."""
        if not _needs_timeout(request):
            _begin(request)
        if request.COOKIES.get(conf.cookie_name) == _YES:
            # The older cookie does not say since when, so it may be since now.
            until = time.time() + conf.seconds
            current_scope().carry({alias: Pin(until, until) for alias in pools().by_primary})
        return None

    def process_response(
        self, request: HttpRequest, response: HttpResponseBase
    ) -> HttpResponseBase:
        """Pin what follows a response that somebody has marked."""
        if getattr(response, "_db_write", False):
            pin_this_request()
        if not _needs_timeout(request):
            pins = outgoing_pins(current_scope())
            for store in conf.stores if pins else ():
                store.save(request, response, pins)
        return response

    def _respond(self, request: HttpRequest) -> Any:
        request._pinning_is_inside = True  # type: ignore[attr-defined]
        response = self.process_request(request) or self._inner(request)
        return self.process_response(request, response)

    async def _arespond(self, request: HttpRequest) -> Any:
        request._pinning_is_inside = True  # type: ignore[attr-defined]
        response = await self._ahook("process_request", request) or await self._inner(request)
        return await self._ahook("process_response", request, response)

    async def _ahook(self, name: str, *args: Any) -> Any:
        hook = getattr(self, name)
        if getattr(type(self), name) is getattr(PinningRouterMiddleware, name):
            return hook(*args)
        # A subclass's may do what async code may not.
        return await sync_to_async(hook)(*args)


def _needs_timeout(request: HttpRequest) -> bool:
    """Return whether ``__call__`` has opened the scope that this request is in."""
    return hasattr(request, "_pinning_is_inside")


def _begin(request: HttpRequest) -> None:
    scope = Scope()
    if request.method in conf.primary_methods:
        scope.read_primary()
    for store in conf.stores_at_start:
        scope.carry(store.load(request))
    enter(scope)
