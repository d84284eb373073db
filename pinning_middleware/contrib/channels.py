"""
Channels: each message of a consumer is a scope.

Mix the class in before the consumer's own, sync or async::

    class Chat(PinnedConsumer, AsyncJsonWebsocketConsumer):
        ...

A message begins with what the connecting request brought (its cookie, say) and with what the
messages before it have left behind. A socket can't set a cookie, so what follows elsewhere learns
of a message's writes from ``CacheStore``, which is asked before each message and told after it, or
by ``pinning_token()``, which the client sends back in the header of ``HeaderStore``.
"""

from __future__ import annotations

import asyncio
from io import BytesIO
from typing import Any

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest

from pinning_middleware.conf import conf
from pinning_middleware.pins import Pins, merge_pins
from pinning_middleware.routing.outgoing import current_token, has_changed, outgoing_pins
from pinning_middleware.scope_blocks import PinningScope
from pinning_middleware.scopes.scope import Scope
from pinning_middleware.stores.base import log_store_error

__all__ = ["PinnedConsumer"]


class PinnedConsumer:
    """Before a consumer's class: opens a scope for each message."""

    scope: Any
    _pins: Pins | None = None
    _request: ASGIRequest | None = None

    async def dispatch(self, message: Any) -> None:
        scope = Scope.of(merge_pins(await self._begin(), await self._load(conf.stores_at_view)))
        async with PinningScope(scope=scope, isolated=True):
            try:
                await super().dispatch(message)  # type: ignore[misc]
            finally:
                if has_changed(scope):
                    # A client that goes away takes the consumer with it, and not its pin.
                    await asyncio.shield(self._save(scope))

    def pinning_token(self) -> str | None:
        """Return the token of what this message has done so far, ``None``: nothing."""
        return current_token()

    async def apinning_token(self) -> str | None:
        """Return ``pinning_token()``, in async code."""
        return await sync_to_async(current_token)()

    async def _begin(self) -> Pins:
        if self._pins is None:
            if "headers" in self.scope:
                self._request = _request_of(self.scope)
            self._pins = await self._load(conf.stores_at_start)
        return self._pins

    async def _load(self, stores: tuple[Any, ...]) -> Pins:
        found: Pins = {}
        for store in stores if self._request is not None else ():
            try:
                found = merge_pins(found, await store.aload(self._request))
            except Exception as error:
                log_store_error(store, "load", error)
        return found

    async def _save(self, scope: Scope) -> None:
        self._pins = await sync_to_async(outgoing_pins)(scope)
        for store in conf.stores if self._request is not None else ():
            try:
                await store.asave(self._request, None, self._pins)
            except Exception as error:
                log_store_error(store, "save", error)


def _request_of(scope: dict[str, Any]) -> ASGIRequest:
    """Return the request by which the socket was opened, for the stores."""
    request = ASGIRequest({"method": "GET", **scope}, BytesIO())
    # As Channels' own middleware has found them.
    for name in ("session", "user"):
        if name in scope:
            setattr(request, name, scope[name])
    return request
