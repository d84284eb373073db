"""
What a store is: it answers two questions, and knows nothing of pools or routing.

``load(request)`` returns the pins that a request comes with, ``save(request, response, pins)``
keeps those that what follows has to honour.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar

from asgiref.sync import sync_to_async

from pinning_middleware.pins import Pin, Pins, live, merge_pins
from pinning_middleware.utils import clock
from pinning_middleware.utils.logging import log_rate_limited

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

__all__ = ["BaseStore", "loaded", "log_store_error", "remember"]

logger = logging.getLogger("pinning_middleware.pins")


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
        """
        Return the pins of this request, by their primaries' aliases; what its client has only
        seen, by the same with ``pins.SEEN`` before them.
        """
        raise NotImplementedError

    def save(self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins) -> None:
        """
        Keep these pins for what follows: all that it is to have. Called only where the request
        has changed something. One that ``load`` returned and that is not among them was ended by
        ``unpin_this_request()``. ``response`` is ``None`` where it is out already, or never will
        be.
        """
        raise NotImplementedError

    async def aload(self, request: HttpRequest) -> Pins:
        return await sync_to_async(self.load)(request)

    async def asave(
        self, request: HttpRequest, response: HttpResponseBase | None, pins: Pins
    ) -> None:
        await sync_to_async(self.save)(request, response, pins)


def remember(request: HttpRequest, store: BaseStore, pins: Pins) -> Pins:
    """Keep with a request what a store found for it."""
    request.__dict__.setdefault("_pinning_loaded", {})[type(store)] = pins
    return pins


def loaded(request: HttpRequest, store: BaseStore | None = None) -> dict[str, Pin]:
    """
    Return what a store found for a request, or what all found together, without those pins that
    have ended by themselves since.
    """
    by_store: dict[type, Pins] = request.__dict__.get("_pinning_loaded", {})
    found = merge_pins(*by_store.values()) if store is None else by_store.get(type(store), {})
    return live(found, clock.now()) if found else {}


def log_store_error(store: object, what: str, error: Exception) -> None:
    """Say that a store could not load or save, once a minute: that is no error of the request."""
    name = store if isinstance(store, str) else type(store).__name__
    log_rate_limited(
        logger,
        logging.ERROR,
        (name, what),
        "%s could not %s the pins; the other stores and the rest of the request go on.",
        name,
        what,
        extra={"store": name, "error": str(error)},
        exc_info=error,
    )
