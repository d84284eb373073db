"""
The interface of a store: `load(request)` returns the pins of a request, `save(request, response,
pins)` keeps the pins for later requests. Stores are independent of routing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

from asgiref.sync import sync_to_async

from pinning_middleware.conf import conf
from pinning_middleware.pins import Pin, PinKey, Pins, live, merge_pins
from pinning_middleware.utils import clock, counters
from pinning_middleware.utils.logging import log_rate_limited

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

logger = logging.getLogger("pinning_middleware.pins")


class BaseStore:
    """
    Base class of stores. Subclasses must provide `load` and `save`; a store that needs no thread
    in async code may provide `aload` and `asave` as well.

    An error raised by a method is logged. The other stores and the response are not affected.
    """

    # Whether `load` needs `request.user` or `request.session`. It is then called in
    # `process_view`, after every other middleware.
    after_authentication: ClassVar[bool] = False
    # Whether `save` needs a response, like a store that sends the pins to the client.
    needs_response: ClassVar[bool] = False

    def load(self, request: HttpRequest) -> Pins:
        """
        Return the pins of this request, as `save` was given them: by the alias of a primary and the
        kind of the pin (`pins.PinKey`). `pins.pack` and `pins.unpack` convert them for JSON.
        """
        raise NotImplementedError("subclasses of BaseStore must provide a load() method")

    def save(self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins) -> None:
        """
        Keep these pins, which replace those of the request. Called only if the request changed
        something. A pin that `load` returned and that is missing was ended by
        `unpin_this_request()`. `response` is None if it has already been sent, or never will be.
        """
        raise NotImplementedError("subclasses of BaseStore must provide a save() method")

    async def aload(self, request: HttpRequest) -> Pins:
        return await sync_to_async(self.load)(request)

    async def asave(
        self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins
    ) -> None:
        await sync_to_async(self.save)(request, response, pins)


def load_pins(
    stores: Iterable[BaseStore], request: HttpRequest, inherit: Callable[[Pins], object]
) -> None:
    """Pass the pins of a request to ``inherit``, store by store. Errors are logged."""
    for store in stores:
        try:
            _pass_on(store.load(request), inherit)
        except Exception as error:
            log_store_error(store, "load", error)


async def aload_pins(
    stores: Iterable[BaseStore], request: HttpRequest, inherit: Callable[[Pins], object]
) -> None:
    """Async version of ``load_pins()``."""
    for store in stores:
        try:
            _pass_on(await store.aload(request), inherit)
        except Exception as error:
            log_store_error(store, "load", error)


def _pass_on(pins: Pins, inherit: Callable[[Pins], object]) -> None:
    if pins:
        inherit(pins)
        counters.pin_events["inherited"] += 1


def save_pins(
    stores: Iterable[BaseStore],
    request: HttpRequest,
    response: HttpResponseBase | None,
    pins: Pins,
) -> None:
    """Save pins in these stores. Their errors are logged."""
    for store in stores:
        try:
            store.save(request, response, pins)
        except Exception as error:
            log_store_error(store, "save", error)


async def asave_pins(
    stores: Iterable[BaseStore],
    request: HttpRequest,
    response: HttpResponseBase | None,
    pins: Pins,
) -> None:
    """Async version of ``save_pins()``."""
    for store in stores:
        try:
            await store.asave(request, response, pins)
        except Exception as error:
            log_store_error(store, "save", error)


def remember_loaded(request: HttpRequest, store: BaseStore, pins: Pins) -> Pins:
    """Record the loaded pins of a store on the request, and return them."""
    request.__dict__.setdefault("_pinning_loaded", {})[type(store)] = pins
    return pins


def loaded_pins(request: HttpRequest, store: BaseStore | None = None) -> dict[PinKey, Pin]:
    """
    Return the pins that a store loaded for a request, or those of all stores merged, without pins
    that have expired since.
    """
    by_store: dict[type, Pins] = request.__dict__.get("_pinning_loaded", {})
    found = merge_pins(*by_store.values()) if store is None else by_store.get(type(store), {})
    return live(found, clock.now(), conf.seconds) if found else {}


def log_store_error(store: BaseStore, action: str, error: Exception) -> None:
    """Log that a store failed to load or save pins (at most once a minute)."""
    name = type(store).__name__
    log_rate_limited(
        logger,
        logging.ERROR,
        (name, action),
        "%s failed to %s pins. Other stores and the response are not affected.",
        name,
        action,
        extra={"store": name, "error": str(error)},
        exc_info=error,
    )
