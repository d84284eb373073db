"""
Where pins live between scopes.

A store answers two questions and knows nothing of pools or routing: ``load(request)`` returns the
pins that a request comes with, ``save(request, response, pins)`` keeps those it leaves behind.
"""

from __future__ import annotations

import secrets
import time
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, cast

from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.contrib.auth import SESSION_KEY
from django.utils.cache import patch_cache_control, patch_vary_headers
from django.utils.functional import empty
from django.utils.http import http_date

from . import keyed, tokens
from .conf import conf
from .pins import Pins, merge_pins

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

__all__ = ["BaseStore", "CacheStore", "CookieStore", "HeaderStore", "TokenStore", "user_key"]


# Of one browser: the pin, and a spare for each of some requests that it had under way at once.
MOST_COOKIES = 8


class BaseStore:
    """
    The two methods of a store, and their async twins for stores that need no thread for them.

    An error that leaves a method is logged, and costs no more than what this store would have
    kept.
    """

    # Whether `load` wants `request.user` or `request.session`: it is then called in
    # `process_view`, when every other middleware has seen the request.
    after_authentication: ClassVar[bool] = False

    def load(self, request: HttpRequest) -> Pins:
        """Return the pins of this request, by their primaries' aliases."""
        raise NotImplementedError

    def save(self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins) -> None:
        """
        Keep these pins for what follows; none: forget what is kept. Called only where something
        has changed. ``response`` is ``None`` where it is out already, or never will be.
        """
        raise NotImplementedError

    async def aload(self, request: HttpRequest) -> Pins:
        return await sync_to_async(self.load)(request)

    async def asave(
        self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins
    ) -> None:
        await sync_to_async(self.save)(request, response, pins)


class TokenStore(BaseStore):
    """What the stores have in common that hand the client a signed token."""

    def read(self, request: HttpRequest) -> list[str]:
        """Return the tokens that the request brings."""
        raise NotImplementedError

    def write(
        self, request: HttpRequest, response: HttpResponseBase, token: str, seconds: float
    ) -> None:
        """Give the client a token that is of use for so many seconds; empty: forget it."""
        raise NotImplementedError

    def load(self, request: HttpRequest) -> Pins:
        brought = self.read(request)
        return (
            merge_pins(*[tokens.accept(token, type(self)) for token in brought]) if brought else {}
        )

    def save(self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins) -> None:
        if response is None:
            return
        if pins:
            until = max([pin.until for pin in pins.values()])
            self.write(request, response, tokens.dumps(pins), max(until - time.time(), 0.0))
        else:
            self.write(request, response, "", 0.0)

    async def aload(self, request: HttpRequest) -> Pins:
        return self.load(request)

    async def asave(
        self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins
    ) -> None:
        self.save(request, response, pins)


class CookieStore(TokenStore):
    """
    Pins a browser, by a signed cookie.

    A browser sends requests in parallel and takes cookies in the order of the responses, so an
    older response could take a newer write's pin away. Hence a write whose request brought a pin,
    which others may be about to end, also leaves a spare under a name that no other request
    knows, and a response ends only the cookies that its request brought.
    """

    def load(self, request: HttpRequest) -> Pins:
        return super().load(request) if request.COOKIES else {}

    def read(self, request: HttpRequest) -> list[str]:
        return [request.COOKIES[name] for name in _brought(request)]

    def write(
        self, request: HttpRequest, response: HttpResponseBase, token: str, seconds: float
    ) -> None:
        brought = _brought(request)
        if token:
            _set_cookie(response, conf.cookie_name, token, seconds)
            if brought:
                spare = f"{conf.cookie_name}.{secrets.token_hex(4)}"
                _set_cookie(response, spare, token, seconds)
        if brought or not token:
            kept = {name: conf.cookie[name] for name in ("path", "domain", "samesite")}
            for name in {conf.cookie_name, *brought} - set(response.cookies):
                response.delete_cookie(name, **kept)
        keep_private(response, "Cookie")


def _set_cookie(response: HttpResponseBase, name: str, token: str, seconds: float) -> None:
    # Browsers count whole seconds; the server's own end is in the token.
    age = int(seconds) + 1
    response.set_cookie(name, token, age, _http_date(int(time.time()) + age), **conf.cookie)


def _brought(request: HttpRequest) -> list[str]:
    """Return the names of the cookies of ours that a request brings, no more than may be there."""
    if not request.COOKIES:
        return []
    name, prefix = conf.cookie_name, conf.cookie_name + "."
    return [n for n in request.COOKIES if n == name or n.startswith(prefix)][:MOST_COOKIES]


@lru_cache(maxsize=4)
def _http_date(second: int) -> str:
    # Most responses of a second have the same date.
    return http_date(second)


class HeaderStore(TokenStore):
    """
    Pins a client without cookies: it sends back the header that it got last, as it got it. An
    empty one says that there is nothing to send any more.
    """

    def read(self, request: HttpRequest) -> list[str]:
        token = request.headers.get(conf.header_name)
        return [token] if token else []

    def write(
        self, request: HttpRequest, response: HttpResponseBase, token: str, seconds: float
    ) -> None:
        response.headers[conf.header_name] = token
        keep_private(response, conf.header_name)


class CacheStore(BaseStore):
    """
    Pins a user on every device, through the cache ``PINNING_CACHE``, under ``PINNING_KEY``.

    Nobody without a key costs a look-up.
    """

    after_authentication = True

    def load(self, request: HttpRequest) -> Pins:
        key = _key(request)
        return _remember(request, keyed.fetch([key]) if key else {})

    def save(self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins) -> None:
        # Asked again: it may be this request that logged the user in.
        if key := _key(request):
            keyed.keep([key], pins, _gone(request, pins))

    async def aload(self, request: HttpRequest) -> Pins:
        key = await _akey(request)
        return _remember(request, await keyed.afetch([key]) if key else {})

    async def asave(
        self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins
    ) -> None:
        if key := await _akey(request):
            await keyed.akeep([key], pins, _gone(request, pins))


def _remember(request: HttpRequest, pins: Pins) -> Pins:
    request._pinning_loaded = pins  # type: ignore[attr-defined]
    return pins


def _gone(request: HttpRequest, pins: Pins) -> Pins:
    loaded: Pins = getattr(request, "_pinning_loaded", {})
    return {alias: pin for alias, pin in loaded.items() if alias not in pins}


def keep_private(response: HttpResponseBase, vary: str) -> None:
    """Tell caches between here and the client that this response is the client's own."""
    headers = response.headers
    if "Vary" in headers:
        patch_vary_headers(response, (vary,))
    else:
        headers["Vary"] = vary
    if "Cache-Control" in headers:
        patch_cache_control(response, private=True)
    else:
        headers["Cache-Control"] = "private"


def user_key(request: HttpRequest) -> str | None:
    """
    Return the logged-in user's id, ``None`` for a visitor: the default of ``PINNING_KEY``.

    The session knows the id, so the user is not asked of the database; a visitor without a
    session costs nothing.
    """
    session = getattr(request, "session", None)
    if session is not None and session.session_key and (known := session.get(SESSION_KEY)):
        return str(known)
    return _other_user(request)


async def auser_key(request: HttpRequest) -> str | None:
    """Return ``user_key(request)``, in async code."""
    session = getattr(request, "session", None)
    if session is not None and session.session_key and (known := await session.aget(SESSION_KEY)):
        return str(known)
    return _other_user(request)


def _other_user(request: HttpRequest) -> str | None:
    """Return the id of a user who is there without a session, by a token say."""
    user = getattr(request, "user", None)
    # A lazy user that nobody has asked for comes from the session.
    if user is None or getattr(user, "_wrapped", None) is empty or not user.is_authenticated:
        return None
    return str(user.pk)


def _key(request: HttpRequest) -> str | None:
    if iscoroutinefunction(conf.key):
        return cast("str | None", async_to_sync(conf.key)(request))
    return conf.key(request)


async def _akey(request: HttpRequest) -> str | None:
    if conf.key is user_key:
        return await auser_key(request)
    if iscoroutinefunction(conf.key):
        return await conf.key(request)  # type: ignore[no-any-return]
    return await sync_to_async(conf.key)(request)
