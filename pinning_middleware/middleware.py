"""
Load, run, save: one scope for each request, sync or async.

The steps are public methods, so that a subclass may override one of them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation

from pinning_middleware.backend.patches import require_app
from pinning_middleware.backend.responses import close_within
from pinning_middleware.conf import conf
from pinning_middleware.decorators import aiterate_within, async_body_of, iterate_within
from pinning_middleware.not_found import RETRIED_METHODS, retry_404
from pinning_middleware.pins import Pins
from pinning_middleware.routing.outgoing import aoutgoing_pins, outgoing_pins, save_keys
from pinning_middleware.scopes.overrides import Override, current_overrides, set_overrides
from pinning_middleware.scopes.scope import Scope, enter, entered_scope
from pinning_middleware.stores import base
from pinning_middleware.stores.balance_key import BalanceKey
from pinning_middleware.utils import counters

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

    from pinning_middleware.stores import BaseStore

logger = logging.getLogger("pinning_middleware")

# Minimum time for which code after a response belongs to its request (seconds).
MIN_LATE_SECONDS = 1.0


class PinningMiddleware:
    """
    The first entry of ``MIDDLEWARE``: gives each request a scope, loads its pins and saves them.

    Raise ImproperlyConfigured if the app is not installed: writes would not be detected.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        require_app("PinningMiddleware")
        self.get_response = get_response
        self.is_async = iscoroutinefunction(get_response)
        if self.is_async:
            markcoroutinefunction(self)

    @property
    def process_view(self) -> Callable[..., Any]:
        """The hook that Django calls before the view, sync or async."""
        return self.aprepare_view if self.is_async else self.prepare_view

    def __call__(self, request: HttpRequest) -> Any:
        if self.is_async:
            return self.__acall__(request)
        if not conf.enabled:
            return self.respond(request)
        outer, response = (entered_scope(), current_overrides()), None
        scope = self.open_scope(request)
        try:
            self.load_pins(scope, request, conf.stores_at_start)
            response = self.respond(request)
            return response
        finally:
            try:
                self.close_scope(scope, request, response)
                if scope.revision:
                    self.save_pins(scope, request, response)
            except Exception:
                logger.exception(
                    "Could not end the scope of a request; its client may read stale data later."
                )
            finally:
                _restore(*outer)

    async def __acall__(self, request: HttpRequest) -> HttpResponseBase:
        if not conf.enabled:
            return await self.arespond(request)  # type: ignore[no-any-return]
        outer, response = (entered_scope(), current_overrides()), None
        scope = self.open_scope(request)
        try:
            await self.aload_pins(scope, request, conf.stores_at_start)
            response = await self.arespond(request)
            return response  # type: ignore[no-any-return]
        finally:
            try:
                self.close_scope(scope, request, response)
                if scope.revision:
                    # A client that disconnects cancels the request, but not its pin.
                    await asyncio.shield(self.asave_pins(scope, request, response))
            except Exception:
                logger.exception(
                    "Could not end the scope of a request; its client may read stale data later."
                )
            finally:
                _restore(*outer)

    # The steps, in order

    def open_scope(self, request: HttpRequest) -> Scope:
        """Open the scope of a request and return it."""
        scope, outer = Scope(), entered_scope()
        # Isolated from the work of the thread, or of a test, outside of requests.
        if outer is not None and not outer.is_ambient:
            scope.parent = outer
        scope.prefers_primary = request.method in conf.primary_methods
        enter(scope)
        return scope

    def load_pins(self, scope: Scope, request: HttpRequest, stores: Iterable[BaseStore]) -> None:
        """Let the scope inherit the pins of the request from these stores."""
        base.load_pins(stores, request, scope.inherit)

    async def aload_pins(
        self, scope: Scope, request: HttpRequest, stores: Iterable[BaseStore]
    ) -> None:
        """Async version of ``load_pins()``."""
        await base.aload_pins(stores, request, scope.inherit)

    def respond(self, request: HttpRequest) -> Any:
        """Return the response, inside the scope."""
        return self.get_response(request)

    async def arespond(self, request: HttpRequest) -> Any:
        """Async version of ``respond()``."""
        return await self.get_response(request)

    def prepare_view(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> None:
        """Load the stores that depend on the user, after every other middleware."""
        if conf.enabled and (scope := entered_scope()) is not None:
            self.configure_scope(scope, request)
            if conf.stores_at_view:
                self.load_pins(scope, request, conf.stores_at_view)

    async def aprepare_view(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> None:
        """Async version of ``prepare_view()``."""
        if conf.enabled and (scope := entered_scope()) is not None:
            self.configure_scope(scope, request)
            if conf.stores_at_view:
                await self.aload_pins(scope, request, conf.stores_at_view)

    def configure_scope(self, scope: Scope, request: HttpRequest) -> None:
        """Apply PINNING_OFFLOAD, PINNING_BALANCE_BY and PINNING_RETRY_404 to the scope."""
        if callable(conf.offload):
            # The first read calls it, when the user is known.
            scope.offload_predicate = functools.partial(_may_offload, request)
        if conf.balance_by_user:
            scope.balance_key = BalanceKey(request)
        if conf.retry_404 and request.method in RETRIED_METHODS:
            scope.wrap_view = retry_404

    def close_scope(self, scope: Scope, request: HttpRequest, response: Any) -> None:
        """End the scope of a request, or let the body and the end of the response belong to it."""
        if scope.parent is not None:
            scope.merge_into(scope.parent)
        late_work = _PostResponse(self, scope, request)
        if response is None:
            late_work.begin()
            return
        if conf.debug or _is_staff(request):
            self.add_server_timing(scope, response)
        # A file needs no database, and servers send it faster without a wrapper.
        if response.streaming and getattr(response, "file_to_stream", None) is None:
            late_work.begin_after_stream(response)
        else:
            close_within(response, late_work)
            late_work.begin()

    def add_server_timing(self, scope: Scope, response: HttpResponseBase) -> None:
        """Report the alias and the reason of each read in a Server-Timing header."""
        routes = dict.fromkeys(scope.routes)
        if routes:
            description = ", ".join(f"{alias}: {reason}" for alias, reason in routes)
            before = response.headers.get("Server-Timing")
            own = f'pinning;desc="{description}"'
            response.headers["Server-Timing"] = f"{before}, {own}" if before else own

    def save_pins(
        self, scope: Scope, request: HttpRequest, response: HttpResponseBase | None
    ) -> None:
        """Save the outgoing pins; without a response, only in stores that need none."""
        pins = outgoing_pins(scope)
        base.save_pins(_stores_to_save(scope, pins, response), request, response, pins)
        if scope.keys:
            save_keys(scope)

    async def asave_pins(
        self, scope: Scope, request: HttpRequest, response: HttpResponseBase | None
    ) -> None:
        """Async version of ``save_pins()``."""
        pins = await aoutgoing_pins(scope)
        await base.asave_pins(_stores_to_save(scope, pins, response), request, response, pins)
        if scope.keys:
            await sync_to_async(save_keys)(scope)


def _restore(scope: Scope | None, overrides: Override | None) -> None:
    enter(scope)
    # A generator that is still suspended may have left an override active.
    set_overrides(overrides)


def _stores_to_save(
    scope: Scope, pins: Pins, response: HttpResponseBase | None
) -> tuple[BaseStore, ...]:
    # The pins of a followed key may cover those of a write, but the client does not have them.
    has_pinned = any(state.is_pinned for state in scope.pools.values())
    if pins == scope.client_pins and not has_pinned:
        return ()
    if pins:
        counters.pin_events["set"] += 1
    return tuple(store for store in conf.stores if response is not None or not store.needs_response)


def _may_offload(request: HttpRequest) -> bool | None:
    """Return what PINNING_OFFLOAD decides, None if it cannot run in the thread of an event loop."""
    offload: Any = conf.offload
    try:
        if iscoroutinefunction(offload):
            return None if _in_event_loop() else bool(async_to_sync(offload)(request))
        return bool(offload(request))
    except SynchronousOnlyOperation:
        return None
    except Exception:
        logger.exception("PINNING_OFFLOAD failed; the request reads from the primary.")
        return False


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _is_staff(request: HttpRequest) -> bool:
    # Django caches the evaluated user there; do not evaluate it here.
    known = request.__dict__
    user = known.get("_cached_user", known.get("_acached_user"))
    try:
        return user is not None and _is_true(user, "is_staff") and _is_true(user, "is_active")
    except Exception:
        # A property of the site, which may query the database.
        return False


def _is_true(user: Any, name: str) -> bool:
    return getattr(user, name, False) is True


class _PostResponse(AbstractContextManager[None]):
    """
    The work of a request after the middleware has returned: streaming content, closing
    the response, and background tasks for a while.

    As a context manager it enters the request's scope, since the server closes the response
    outside of it.
    """

    # The revision of the scope that the middleware saves before streaming content begins.
    _saved_revision = 0

    def __init__(self, middleware: PinningMiddleware, scope: Scope, request: HttpRequest) -> None:
        self._middleware, self._scope, self._request = middleware, scope, request
        self._entered: Scope | None = scope
        self._overrides = current_overrides()
        # How long background tasks belong to their request.
        self._seconds = max(conf.seconds, MIN_LATE_SECONDS)
        # Closing a response closes its body, so it may be entered inside itself.
        self._outer: list[tuple[Scope | None, Override | None]] = []

    def __enter__(self) -> None:
        self._scope.extend(self._seconds)
        self._outer.append((entered_scope(), current_overrides()))
        enter(self._entered)
        set_overrides(self._overrides)

    def __exit__(self, *exc_info: object) -> None:
        # Streaming content may be inside its own scope between two chunks.
        self._entered, self._overrides = entered_scope(), current_overrides()
        _restore(*self._outer.pop())

    def __reduce__(self) -> tuple[type[nullcontext[None]], tuple[()]]:
        # A cache outside this middleware pickles the response before it is closed.
        return nullcontext, ()

    def begin(self) -> None:
        """Close the scope: later writes are saved as soon as they end."""
        save = functools.partial(_save_change, self._middleware, self._request)
        self._scope.close(self._seconds, save)

    def begin_after_stream(self, response: Any) -> None:
        """Have streaming content generated inside the scope, which is closed at its end."""
        self._saved_revision = self._scope.revision
        close_within(response, _closing(self))
        if response.is_async:
            parts: Any = aiterate_within(self, *async_body_of(response))
            response.streaming_content = _abody(self, parts)
        else:
            parts = iterate_within(self, response.streaming_content)
            response.streaming_content = _body(self, parts)

    def finish(self) -> None:
        """Close the scope after streaming content, and save its writes."""
        if not self._scope.is_closed:
            # First, so that a write during the save is saved, too.
            self.begin()
            if self._scope.revision != self._saved_revision:
                _save_late(self._middleware, self._request, self._scope)

    async def afinish(self) -> None:
        """Async version of ``finish()``."""
        if not self._scope.is_closed:
            self.begin()
            if self._scope.revision != self._saved_revision:
                await sync_to_async(_save_late)(self._middleware, self._request, self._scope)


# Saves that the event loop has begun.
_saves: set[asyncio.Future[None]] = set()


def _save_change(middleware: PinningMiddleware, request: HttpRequest, scope: Scope) -> None:
    """Save a write after the response; in an event loop soon, without blocking it."""
    if not _in_event_loop():
        _save_late(middleware, request, scope)
        return
    save = asyncio.ensure_future(sync_to_async(_save_late)(middleware, request, scope))
    # The loop itself keeps no reference.
    _saves.add(save)
    save.add_done_callback(_saves.discard)


def _save_late(middleware: PinningMiddleware, request: HttpRequest, scope: Scope) -> None:
    """Save writes after the response, in the stores that need no response."""
    if scope.parent is not None:
        scope.merge_into(scope.parent)
    if not scope.keys and all(store.needs_response for store in conf.stores):
        # No store can save it, so do not query the primary's position.
        return
    try:
        middleware.save_pins(scope, request, None)
    except Exception:
        logger.exception("Could not save the pins of a request after its response.")


@contextmanager
def _closing(late_work: _PostResponse) -> Iterator[None]:
    """The context in which a streaming response is closed."""
    try:
        with late_work:
            yield
    finally:
        # Content that was not started, or was abandoned, has not finished the scope.
        late_work.finish()


def _body(late_work: _PostResponse, parts: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from parts
    finally:
        late_work.finish()


async def _abody(late_work: _PostResponse, parts: Any) -> AsyncIterator[bytes]:
    try:
        async for part in parts:
            yield part
    finally:
        await parts.aclose()
        await asyncio.shield(late_work.afinish())
