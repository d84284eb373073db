"""
Channels: each message of a consumer runs in a scope of its own.

Put the mixin before the consumer's class, sync or async::

    class Chat(PinnedConsumer, AsyncJsonWebsocketConsumer):
        ...

A message inherits the pins of the connecting request (for example from its cookie) and of earlier
messages. A socket cannot set a cookie. Later requests inherit a message's pins from
``CacheStore``, which is loaded before each message and saved after it. Or the client sends
``pinning_token()`` back in the header of ``HeaderStore``.
"""

from __future__ import annotations

import asyncio
from io import BytesIO
from typing import Any

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest

from pinning_middleware import handoff
from pinning_middleware.conf import conf
from pinning_middleware.pins import Pins, merge_pins
from pinning_middleware.routing.outgoing import outgoing_pins, save_keys
from pinning_middleware.scopes.scope import Scope, entered_scope
from pinning_middleware.stores import base

__all__ = ["PinnedConsumer"]


class PinnedConsumer:
    """A mixin for consumers that opens a scope for each message."""

    scope: Any
    _pins: Pins | None = None
    _request: ASGIRequest | None = None

    async def dispatch(self, message: Any) -> None:
        if not conf.enabled:
            await super().dispatch(message)  # type: ignore[misc]
            return
        inherited = merge_pins(await self._begin(), await self._load(conf.stores_at_view))
        block = handoff.task_scope(inherited, isolated=True)
        block.on_late_change = self._save_late
        async with block:
            try:
                await super().dispatch(message)  # type: ignore[misc]
            finally:
                scope = entered_scope()
                if scope is not None:
                    # Also what another task writes during the save.
                    scope.on_late_change = self._save_late
                    if scope.revision:
                        # A disconnect cancels the consumer, but must not cancel the save.
                        await asyncio.shield(self._save())

    def pinning_token(self) -> str | None:
        """Return the outgoing token of this message so far, or None if there are no pins."""
        return handoff.token_to_send()

    async def apinning_token(self) -> str | None:
        """Async version of ``pinning_token()``."""
        return await sync_to_async(handoff.token_to_send)()

    async def _begin(self) -> Pins:
        if self._pins is None:
            if "headers" in self.scope:
                self._request = _request_of(self.scope)
            self._pins = await self._load(conf.stores_at_start)
        return self._pins

    async def _load(self, stores: tuple[Any, ...]) -> Pins:
        found: list[Pins] = []
        if self._request is not None:
            _update(self._request, self.scope)
            await base.aload_pins(stores, self._request, found.append)
        return merge_pins(*found)

    def _save_late(self, scope: Scope) -> None:
        """Save writes after the end of a message; later messages inherit their pins."""
        self._pins = merge_pins(self._pins or {}, outgoing_pins(scope))
        if scope.keys:
            save_keys(scope)
        if self._request is not None:
            _update(self._request, self.scope)
            stores = (store for store in conf.stores if not store.needs_response)
            base.save_pins(stores, self._request, None, self._pins)

    async def _save(self) -> None:
        self._pins = await sync_to_async(handoff.pins_to_send)()
        if self._request is not None:
            _update(self._request, self.scope)
            await base.asave_pins(conf.stores, self._request, None, self._pins)


def _request_of(scope: dict[str, Any]) -> ASGIRequest:
    """Return the connecting request, for the stores."""
    return ASGIRequest({"method": "GET", **scope}, BytesIO())


def _update(request: ASGIRequest, scope: dict[str, Any]) -> None:
    """Set what the middleware of Channels, or the consumer itself, has put into the scope."""
    for name in ("session", "user"):
        if name in scope:
            setattr(request, name, scope[name])
