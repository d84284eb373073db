"""Stores that send the client a signed token: in a cookie, or in a header."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.utils.cache import patch_vary_headers

from pinning_middleware import tokens
from pinning_middleware.conf import conf
from pinning_middleware.pins import PinKind, Pins, merge_pins
from pinning_middleware.stores.base import BaseStore, loaded_pins, remember_loaded
from pinning_middleware.utils import clock

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

# The value of the cookie of django-multidb-router.
MULTIDB_VALUE = "y"
# What lets shared caches store a response: directives of Cache-Control, and suffixes of the headers
# that override it (for example Cloudflare-CDN-Cache-Control, and X-Accel-Expires of nginx).
_SHARED_DIRECTIVES = ("public", "private", "s-maxage")
_SHARED_HEADERS = ("cdn-cache-control", "surrogate-control", "edge-control", "x-accel-expires")


class TokenStore(BaseStore):
    """Base class of stores that send the client a signed token."""

    needs_response = True

    def read(self, request: HttpRequest) -> list[str]:
        """Return the tokens of the request, without empty ones."""
        raise NotImplementedError("subclasses of TokenStore must provide a read() method")

    def write(self, request: HttpRequest, response: HttpResponseBase, pins: Pins) -> None:
        """Add the token of these pins to the response; remove that of the client if none."""
        raise NotImplementedError("subclasses of TokenStore must provide a write() method")

    def load(self, request: HttpRequest) -> Pins:
        if not (received := self.read(request)):
            return {}
        pins = merge_pins(*[tokens.accept(token, type(self)) for token in received])
        return remember_loaded(request, self, pins)

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
    Pins a browser by a signed cookie. Positions that it has only read are in a separate cookie, so
    that a read never overwrites the pin of a write.
    """

    def read(self, request: HttpRequest) -> list[str]:
        names = (conf.cookie_name, conf.seen_cookie_name)
        # Django's test client sends a deleted cookie as an empty one.
        received = [token for name in names if (token := request.COOKIES.get(name))]
        # Processes that still run django-multidb-router set the same cookie.
        return [t for t in received if not (t == MULTIDB_VALUE and conf.uses_multidb_names)]

    def write(self, request: HttpRequest, response: HttpResponseBase, pins: Pins) -> None:
        # Compare with all loaded pins; one that expired meanwhile was not removed.
        before, now = loaded_pins(request), clock.now()
        # The window bounds the cookie. The clock that it was measured by may differ from this one,
        # so what the browser has presented counts.
        pins = {key: pin for key, pin in pins.items() if key in before or pin.until > now}
        is_set = _put(request, response, conf.cookie_name, _written(before), _written(pins))
        if conf.monotonic_reads:
            name = conf.seen_cookie_name
            is_set = _put(request, response, name, _observed(before), _observed(pins)) or is_set
        if is_set:
            make_private(response, "Cookie")


def _put(
    request: HttpRequest, response: HttpResponseBase, name: str, before: Pins, pins: Pins
) -> bool:
    """Set or delete a cookie if its pins changed. Return whether they did."""
    if _content(pins) == _content(before):
        return False
    if not pins:
        if not request.COOKIES.get(name):
            return False
        attributes = {part: conf.cookie[part] for part in ("path", "domain", "samesite")}
        response.delete_cookie(name, **attributes)
        return True
    response.set_cookie(name, tokens.dumps(pins), _max_age(pins), **conf.cookie)
    return True


def _max_age(pins: Pins) -> int:
    """
    Return the Max-Age of a cookie with these pins (seconds). The browser measures it by its own
    clock, so that a position also counts where this server's clock is ahead of that of the writer.
    """
    left = [pin.until - clock.now() for pin in pins.values()]
    # Browsers count whole seconds; the exact end is in the token.
    return max(1, int(max(seconds if seconds > 0 else conf.seconds for seconds in left)) + 1)


def _content(pins: Pins) -> dict[Any, Any]:
    # Merging a pin with itself may change its representation.
    return {key: (pin.until, pin.primary_only_end, pin.position) for key, pin in pins.items()}


def _written(pins: Pins) -> Pins:
    return {key: pin for key, pin in pins.items() if key.kind is not PinKind.OBSERVED}


def _observed(pins: Pins) -> Pins:
    return {key: pin for key, pin in pins.items() if key.kind is PinKind.OBSERVED}


class HeaderStore(TokenStore):
    """
    Pins a client without cookies, which sends the last header that it received. An empty
    header means that the client must no longer send one.
    """

    def read(self, request: HttpRequest) -> list[str]:
        token = request.headers.get(conf.header_name)
        return [token] if token else []

    def write(self, request: HttpRequest, response: HttpResponseBase, pins: Pins) -> None:
        if pins or loaded_pins(request, self):
            response.headers[conf.header_name] = tokens.dumps(pins) if pins else ""
            make_private(response, conf.header_name)


def make_private(response: HttpResponseBase, vary: str) -> None:
    """Prevent shared caches from storing this response."""
    headers = response.headers
    patch_vary_headers(response, (vary,))
    parts = [part.strip() for part in headers.get("Cache-Control", "").split(",") if part.strip()]
    kept = [p for p in parts if p.partition("=")[0].lower() not in _SHARED_DIRECTIVES]
    headers["Cache-Control"] = ", ".join([*kept, "private"])
    for name in tuple(headers):
        if name.lower().endswith(_SHARED_HEADERS):
            del headers[name]
