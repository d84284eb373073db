"""Stores that hand the client a signed token: in a cookie, or in a header."""

from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from django.utils.cache import patch_vary_headers
from django.utils.http import http_date

from pinning_middleware import tokens
from pinning_middleware.conf import conf
from pinning_middleware.pins import SEEN, Pins, live, merge_pins
from pinning_middleware.stores.base import BaseStore, loaded, remember
from pinning_middleware.utils import clock

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

__all__ = ["CookieStore", "HeaderStore", "TokenStore", "keep_private"]

# What lets caches between here and the client keep a response: parts of a header, and what headers
# end with that go before it (Cloudflare-CDN-Cache-Control, say; nginx has X-Accel-Expires).
_SHARED = ("public", "private", "s-maxage")
_SHARED_HEADERS = ("cdn-cache-control", "surrogate-control", "edge-control", "x-accel-expires")

_NO_PINS: Pins = MappingProxyType({})


class TokenStore(BaseStore):
    """What the stores have in common that hand the client a signed token."""

    def read(self, request: HttpRequest) -> list[str]:
        """Return the tokens that the request brings; an empty text is none."""
        raise NotImplementedError

    def write(self, request: HttpRequest, response: HttpResponseBase, pins: Pins) -> None:
        """Give the client what it is to bring from now on; no pins: nothing."""
        raise NotImplementedError

    def load(self, request: HttpRequest) -> Pins:
        if not (brought := self.read(request)):
            return {}
        pins = merge_pins(*[tokens.accept(token, type(self)) for token in brought])
        return remember(request, self, pins)

    def save(self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins) -> None:
        if response is not None:
            self.write(request, response, pins)

    async def aload(self, request: HttpRequest) -> Pins:
        return self.load(request)

    async def asave(
        self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins
    ) -> None:
        self.save(request, response, pins)


class CookieStore(TokenStore):
    """
    Pins a browser, by a signed cookie. What it has only seen travels in a cookie of its own, so
    that a read never overwrites a write's pin.
    """

    def load(self, request: HttpRequest) -> Pins:
        # Every request comes by here, and most bring no pin. Who needs no cookie parses none; the
        # name of the other one begins with this one's.
        brought = request.META.get("HTTP_COOKIE", "")
        if conf.cookie_name not in brought and "COOKIES" not in request.__dict__:
            return _NO_PINS
        return super().load(request) if request.COOKIES else _NO_PINS

    def read(self, request: HttpRequest) -> list[str]:
        cookies = request.COOKIES
        names = (conf.cookie_name, conf.seen_cookie_name)
        # Django's test client sends a cookie that was deleted as an empty one.
        return [token for name in names if (token := cookies.get(name))]

    def write(self, request: HttpRequest, response: HttpResponseBase, pins: Pins) -> None:
        # What any store brought is no news; what ended meanwhile was not ended by this request.
        before, pins = loaded(request), live(pins, clock.now())
        is_set = _put(request, response, conf.cookie_name, _own(before), _own(pins))
        if conf.monotonic_reads:
            name = conf.seen_cookie_name
            is_set = _put(request, response, name, _seen(before), _seen(pins)) or is_set
        if is_set:
            keep_private(response, "Cookie")


def _put(
    request: HttpRequest, response: HttpResponseBase, name: str, before: Pins, pins: Pins
) -> bool:
    """Set or end a cookie where that changes something; return whether it did."""
    if _content(pins) == _content(before):
        return False
    if not pins:
        if not request.COOKIES.get(name):
            return False
        kept = {part: conf.cookie[part] for part in ("path", "domain", "samesite")}
        response.delete_cookie(name, **kept)
        return True
    # Browsers count whole seconds; the server's own end is in the token.
    now = clock.now()
    age = int(max([pin.until for pin in pins.values()]) - now) + 1
    expires = _http_date(int(now) + age)
    response.set_cookie(name, tokens.dumps(pins), age, expires, **conf.cookie)
    return True


def _content(pins: Pins) -> dict[str, Any]:
    # A pin that was merged with itself may say the same in another way.
    return {alias: (p.until, p.held_until, p.position or None) for alias, p in pins.items()}


def _own(pins: Pins) -> Pins:
    return {alias: pin for alias, pin in pins.items() if alias[0] != SEEN}


def _seen(pins: Pins) -> Pins:
    return {alias: pin for alias, pin in pins.items() if alias[0] == SEEN}


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

    def write(self, request: HttpRequest, response: HttpResponseBase, pins: Pins) -> None:
        if pins or loaded(request, self):
            response.headers[conf.header_name] = tokens.dumps(pins) if pins else ""
            keep_private(response, conf.header_name)


def keep_private(response: HttpResponseBase, vary: str) -> None:
    """Tell caches between here and the client that this response is the client's own."""
    headers = response.headers
    present = {name.lower() for name in headers}
    if "vary" in present:
        patch_vary_headers(response, (vary,))
    else:
        headers["Vary"] = vary
    if "cache-control" in present:
        parts = [part.strip() for part in headers["Cache-Control"].split(",") if part.strip()]
        kept = [part for part in parts if part.partition("=")[0].lower() not in _SHARED]
        headers["Cache-Control"] = ", ".join([*kept, "private"])
    else:
        headers["Cache-Control"] = "private"
    for known in present:
        if known.endswith(_SHARED_HEADERS):
            del headers[known]
