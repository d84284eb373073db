"""Load, run, save: one scope for each request, sync or async."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.core.signals import setting_changed

from pinning_middleware.conf import conf, on_change
from pinning_middleware.decorators import (
    aiterate_within,
    async_body_of,
    close_within,
    iterate_within,
)
from pinning_middleware.routing.outgoing import (
    akeep_keys,
    asks_database,
    count_changes,
    keep_keys,
    outgoing_pins,
)
from pinning_middleware.scopes.overrides import enter_blocks, open_blocks
from pinning_middleware.scopes.scope import Scope, enter, entered_scope
from pinning_middleware.stores.base import log_store_error
from pinning_middleware.utils import counters

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

    from pinning_middleware.stores import BaseStore

__all__ = ["PinningMiddleware"]

logger = logging.getLogger("pinning_middleware")


class PinningMiddleware:
    """The first entry of ``MIDDLEWARE``: gives each request its scope and remembers its pins."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)
        self.process_view = self._aprocess_view if self._is_async else self._process_view

    def __call__(self, request: HttpRequest) -> Any:
        if self._is_async:
            return self.__acall__(request)
        plan = _plan or _make_plan()
        if not plan.is_enabled:
            return self.get_response(request)
        outer, blocks, response = entered_scope(), open_blocks(), None
        scope = _begin(plan, request, outer)
        try:
            for store in plan.at_start:
                _load(scope, store, request)
            response = self.get_response(request)
            return response
        finally:
            try:
                if _end(plan, scope, request, response):
                    _save(scope, request, response)
            finally:
                enter(outer)
                if open_blocks() is not blocks:
                    # A generator that is still suspended has left one open.
                    enter_blocks(blocks)

    async def __acall__(self, request: HttpRequest) -> HttpResponseBase:
        plan = _plan or _make_plan()
        if not plan.is_enabled:
            return await self.get_response(request)  # type: ignore[no-any-return]
        outer, blocks, response = entered_scope(), open_blocks(), None
        scope = _begin(plan, request, outer)
        try:
            for store in plan.at_start:
                await _aload(scope, store, request)
            response = await self.get_response(request)
            return response  # type: ignore[no-any-return]
        finally:
            try:
                if _end(plan, scope, request, response):
                    # A client that goes away takes the request with it, and not its pin.
                    await asyncio.shield(_asave(scope, request, response))
            finally:
                enter(outer)
                if open_blocks() is not blocks:
                    enter_blocks(blocks)

    def _process_view(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> None:
        plan = _plan or _make_plan()
        if plan.minds_user and (scope := _on_view(request)) is not None:
            for store in plan.at_view:
                _load(scope, store, request)

    async def _aprocess_view(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> None:
        plan = _plan or _make_plan()
        if plan.minds_user and (scope := _on_view(request)) is not None:
            for store in plan.at_view:
                await _aload(scope, store, request)


class _Plan(NamedTuple):
    """The settings that every request needs: a field of this costs less than one of ``conf``."""

    is_enabled: bool
    methods: frozenset[str]
    at_start: tuple[BaseStore, ...]
    at_view: tuple[BaseStore, ...]
    # Whether there is anything to do when the user is known.
    minds_user: bool
    is_debug: bool


_plan: _Plan | None = None


def _make_plan() -> _Plan:
    global _plan
    at_start, at_view = conf.stores_at_start, conf.stores_at_view
    minds_user = conf.enabled and bool(at_view or callable(conf.offload))
    _plan = _Plan(conf.enabled, conf.primary_methods, at_start, at_view, minds_user, conf.debug)
    return _plan


@on_change
def _forget_plan() -> None:
    global _plan
    _plan = None


def _on_debug(*, setting: str, **kwargs: Any) -> None:
    if setting == "DEBUG":
        _forget_plan()


setting_changed.connect(_on_debug, dispatch_uid="pinning_middleware.middleware")


def _begin(plan: _Plan, request: HttpRequest, outer: Scope | None) -> Scope:
    scope = Scope()
    # What its server's thread, or a test, did outside of all requests is not its own.
    if outer is not None and not outer.is_lasting:
        scope.outer = outer
    if request.method in plan.methods:
        scope.read_primary()
    enter(scope)
    return scope


def _end(plan: _Plan, scope: Scope, request: HttpRequest, response: Any) -> bool:
    """
    End a request's scope, or let its body go on with it; return whether what follows it has to
    know of something that it did.
    """
    if scope.outer is not None:
        scope.tell(scope.outer)
    if response is not None:
        # Where Django keeps the user once somebody has asked for it; nobody is asked for its sake.
        kept = request.__dict__
        user = kept.get("_cached_user") or kept.get("_acached_user")
        if plan.is_debug or (user is not None and _is_staff(user)):
            _explain(scope, response)
    if response is not None and response.streaming:
        _follow(scope, request, response)
    elif scope.from_primary:
        scope.end(request)
    else:
        scope.ended = request
    # As `has_changed` has it: every request comes by here.
    for facts in scope.values():
        if facts.changes:
            return True
    return bool(scope.pinned_keys)


def _is_staff(user: Any) -> bool:
    return bool(getattr(user, "is_staff", False) and user.is_active)


def _explain(scope: Scope, response: Any) -> None:
    """Say where this request's reads went and why."""
    routes = dict.fromkeys(route for facts in scope.values() for route in facts.routes)
    if routes:
        said = ", ".join(f"{alias}: {reason}" for alias, reason in routes)
        before = response.headers.get("Server-Timing")
        mine = f'pinning;desc="{said}"'
        response.headers["Server-Timing"] = f"{before}, {mine}" if before else mine


def _on_view(request: HttpRequest) -> Scope | None:
    """Let who says what may be offloaded be asked from now on, when the user is known."""
    scope = entered_scope()
    offload = conf.offload
    if scope is not None and callable(offload):
        if iscoroutinefunction(offload):
            offload = async_to_sync(offload)
        scope.ask_offload = functools.partial(_asked, offload, request)
    return scope


def _asked(offload: Callable[[HttpRequest], Any], request: HttpRequest) -> bool:
    try:
        return bool(offload(request))
    except Exception:
        logger.exception("PINNING_OFFLOAD failed; this request reads from the primary.")
        return False


def _load(scope: Scope, store: BaseStore, request: HttpRequest) -> None:
    try:
        if pins := store.load(request):
            counters.pins["carried"] += 1
            scope.carry(pins)
    except Exception as error:
        log_store_error(store, "load", error)


async def _aload(scope: Scope, store: BaseStore, request: HttpRequest) -> None:
    try:
        if pins := await store.aload(request):
            counters.pins["carried"] += 1
            scope.carry(pins)
    except Exception as error:
        log_store_error(store, "load", error)


def _save(scope: Scope, request: HttpRequest, response: HttpResponseBase | None) -> None:
    pins = outgoing_pins(scope)
    try:
        if scope.pinned_keys:
            keep_keys(scope)
    except Exception as error:
        log_store_error("The cache of keys", "save", error)
    if pins == scope.carried:
        return
    counters.pins["set"] += bool(pins)
    for store in conf.stores:
        try:
            store.save(request, response, pins)
        except Exception as error:
            log_store_error(store, "save", error)


async def _asave(scope: Scope, request: HttpRequest, response: HttpResponseBase | None) -> None:
    if asks_database(scope):
        pins = await sync_to_async(outgoing_pins)(scope)
    else:
        pins = outgoing_pins(scope)
    try:
        if scope.pinned_keys:
            await akeep_keys(scope)
    except Exception as error:
        log_store_error("The cache of keys", "save", error)
    if pins == scope.carried:
        return
    counters.pins["set"] += bool(pins)
    for store in conf.stores:
        try:
            await store.asave(request, response, pins)
        except Exception as error:
            log_store_error(store, "save", error)


def _save_late(scope: Scope, request: HttpRequest) -> None:
    """Save what a child task or a thread wrote after its request was over."""
    _save(scope, request, None)


Scope.saver = _save_late


def _follow(scope: Scope, request: HttpRequest, response: Any) -> None:
    """Let a streaming body be part of the scope, and save what it writes."""
    if getattr(response, "file_to_stream", None) is not None:
        return  # A file reads no database, and servers send it faster as it is.
    inside = _Inside(scope)
    close_within(inside, response)
    if response.is_async:
        parts: Any = aiterate_within(inside, *async_body_of(response))
        response.streaming_content = _abody(scope, request, parts)
    else:
        parts = iterate_within(inside, response.streaming_content)
        response.streaming_content = _body(scope, request, parts)


class _Inside(AbstractContextManager[None]):
    """
    The request's own scope and blocks, or those that its body has entered, for the making of a part
    of the body: the server's context, between two parts, is not the request's.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope: Scope | None = scope
        self._blocks = open_blocks()

    def __enter__(self) -> None:
        self._outer = entered_scope(), open_blocks()
        enter(self._scope)
        enter_blocks(self._blocks)

    def __exit__(self, *exc_info: object) -> None:
        self._scope, self._blocks = entered_scope(), open_blocks()
        enter(self._outer[0])
        enter_blocks(self._outer[1])


def _body(scope: Scope, request: HttpRequest, parts: Iterator[bytes]) -> Iterator[bytes]:
    before = count_changes(scope), scope.pinned_keys
    try:
        yield from parts
    finally:
        if (count_changes(scope), scope.pinned_keys) != before:
            _save(scope, request, None)
        scope.end(request)


async def _abody(scope: Scope, request: HttpRequest, parts: Any) -> AsyncIterator[bytes]:
    before = count_changes(scope), scope.pinned_keys
    try:
        async for part in parts:
            yield part
    finally:
        await parts.aclose()
        if (count_changes(scope), scope.pinned_keys) != before:
            await asyncio.shield(_asave(scope, request, None))
        scope.end(request)
