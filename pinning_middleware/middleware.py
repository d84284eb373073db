"""Load, run, save: one scope for each request, sync or async."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.db import connections

from .conf import conf
from .pools import pools
from .scopes import (
    akeep_keys,
    asks_database,
    count_changes,
    has_changed,
    keep_keys,
    left_behind,
)
from .state import Scope, enter, entered_scope

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

    from .stores import BaseStore

__all__ = ["PinningMiddleware"]

logger = logging.getLogger("pinning_middleware")
_LOST = "%s could not %s the pins; the other stores and the rest of the request go on."


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
        if not conf.enabled:
            return self.get_response(request)
        scope = Scope(primary_first=request.method in conf.primary_methods)
        outer, response = entered_scope(), None
        enter(scope if outer is None else scope.within(outer))
        try:
            _load(scope, conf.stores_at_start, request)
            response = self.get_response(request)
            return response
        finally:
            if has_changed(scope):
                _save(scope, request, response)
            if response is not None and response.streaming:
                _follow(scope, request, response)
            enter(outer)

    async def __acall__(self, request: HttpRequest) -> HttpResponseBase:
        if not conf.enabled:
            return await self.get_response(request)  # type: ignore[no-any-return]
        scope = Scope(primary_first=request.method in conf.primary_methods)
        outer, response = entered_scope(), None
        enter(scope if outer is None else scope.within(outer))
        try:
            await _aload(scope, conf.stores_at_start, request)
            response = await self.get_response(request)
            return response  # type: ignore[no-any-return]
        finally:
            if has_changed(scope):
                await _asave(scope, request, response)
            if response is not None and response.streaming:
                _follow(scope, request, response)
            enter(outer)

    def _process_view(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> None:
        if (scope := _on_view(view)) is not None:
            _load(scope, conf.stores_at_view, request)

    async def _aprocess_view(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> None:
        if (scope := _on_view(view)) is not None:
            await _aload(scope, conf.stores_at_view, request)


def _on_view(view: Any) -> Scope | None:
    """Note which transactions Django opens around this view by itself."""
    scope = entered_scope()
    if scope is None or not conf.enabled:
        return None
    atomic = tuple(
        alias for alias in pools().by_primary if connections.settings[alias]["ATOMIC_REQUESTS"]
    )
    if atomic:
        without = getattr(view, "_non_atomic_requests", ())
        scope.atomic_view = tuple(alias for alias in atomic if alias not in without)
    return scope


def _load(scope: Scope, stores: Iterable[BaseStore], request: HttpRequest) -> None:
    for store in stores:
        try:
            if pins := store.load(request):
                scope.carry(pins)
        except Exception:
            logger.exception(_LOST, type(store).__name__, "load")


async def _aload(scope: Scope, stores: Iterable[BaseStore], request: HttpRequest) -> None:
    for store in stores:
        try:
            if pins := await store.aload(request):
                scope.carry(pins)
        except Exception:
            logger.exception(_LOST, type(store).__name__, "load")


def _save(scope: Scope, request: HttpRequest, response: HttpResponseBase | None) -> None:
    pins = left_behind(scope)
    if scope.pinned_keys:
        keep_keys(scope)
    if pins == scope.carried:
        return
    for store in conf.stores:
        try:
            store.save(request, response, pins)
        except Exception:
            logger.exception(_LOST, type(store).__name__, "save")


async def _asave(scope: Scope, request: HttpRequest, response: HttpResponseBase | None) -> None:
    if asks_database(scope):
        pins = await sync_to_async(left_behind)(scope)
    else:
        pins = left_behind(scope)
    if scope.pinned_keys:
        await akeep_keys(scope)
    if pins == scope.carried:
        return
    for store in conf.stores:
        try:
            await store.asave(request, response, pins)
        except Exception:
            logger.exception(_LOST, type(store).__name__, "save")


def _follow(scope: Scope, request: HttpRequest, response: Any) -> None:
    """Let a streaming body be part of the scope, and save what it writes."""
    if getattr(response, "file_to_stream", None) is not None:
        return  # A file reads no database, and servers send it faster as it is.
    # The view is over, and with it the transaction that Django opened around it.
    scope.atomic_view = ()
    follow = _abody if response.is_async else _body
    response.streaming_content = follow(scope, request, response.streaming_content)


def _body(scope: Scope, request: HttpRequest, content: Iterator[bytes]) -> Iterator[bytes]:
    before = count_changes(scope)
    try:
        while True:
            # The server's own context, between two parts, is not the request's.
            outer = entered_scope()
            enter(scope)
            try:
                part = next(content)
            except StopIteration:
                return
            finally:
                enter(outer)
            yield part
    finally:
        if count_changes(scope) != before:
            _save(scope, request, None)


async def _abody(
    scope: Scope, request: HttpRequest, content: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    before = count_changes(scope)
    try:
        while True:
            outer = entered_scope()
            enter(scope)
            try:
                part = await anext(content)
            except StopAsyncIteration:
                return
            finally:
                enter(outer)
            yield part
    finally:
        if count_changes(scope) != before:
            await _asave(scope, request, None)
