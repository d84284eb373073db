from __future__ import annotations

import asyncio
import contextvars
import io
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from inspect import isawaitable
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async
from django.core.handlers.base import BaseHandler
from django.core.handlers.wsgi import WSGIHandler
from django.db import connections
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from django.test import AsyncRequestFactory, RequestFactory, override_settings
from django.test.utils import CaptureQueriesContext
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import (
    ignore_writes,
    is_pinned,
    pin_keys,
    pin_this_request,
    pinning_scope,
    tokens,
    unpin_this_request,
    use_primary,
    use_replica,
)
from pinning_middleware.middleware import PinningMiddleware
from pinning_middleware.pins import Pin, PinKey
from pinning_middleware.scopes.scope import entered_scope
from pinning_middleware.stores import cache as keyed
from tests.app import stores
from tests.app.models import Book
from tests.conftest import MIDDLEWARE, Browser, Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

COOKIE_STORE = "pinning_middleware.stores.CookieStore"


@pytest.fixture
def kept() -> Iterator[list[Any]]:
    """Return the list of pins saved by a recording store beside the cookie."""
    stores.kept.clear()
    with override_settings(PINNING_STORES=[COOKIE_STORE, "tests.app.stores.RecordingStore"]):
        yield stores.kept
    stores.kept.clear()


def write(request: Any = None) -> str:
    Book.objects.create(title="x")
    return "written"


def test_user_reads_their_own_writes(visit: Visit) -> None:
    """Another user, who did not write, reads a replica."""
    assert visit(lambda request: Book.objects.count()) == 0
    visit(write)
    assert visit(lambda request: Book.objects.count()) == 1
    visit.browser.cookies.clear()
    assert visit(lambda request: Book.objects.count()) == 0


def test_query_request_reads_a_replica(new_browser: Callable[..., Browser], do: Any) -> None:
    """QUERY is safe, although it has a body."""
    served: list[str] = []
    path = f"/sync/{do(lambda request: served.append(where()) or 'done')}/"
    client = new_browser().client

    async def send(method: str) -> None:
        response = client.generic(method, path, b"title=x")
        if isawaitable(response):
            await response

    for method in ("QUERY", "POST"):
        async_to_sync(send)(method)
    assert served[0] != "default"
    assert served[1] == "default"


def test_browsers_have_separate_pins(
    new_browser: Callable[..., Browser], do: Callable[..., str]
) -> None:
    writer, reader = new_browser(), new_browser()
    writer.get(f"/sync/{do(write)}/")
    address = f"/sync/{do(lambda request: Book.objects.count())}/"
    assert (writer.get(address).content, reader.get(address).content) == (b"1", b"0")


# Cookie


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"domain": "", "path": "/", "secure": "", "samesite": "Lax", "httponly": True}),
        (
            {
                "SESSION_COOKIE_DOMAIN": "example.com",
                "SESSION_COOKIE_PATH": "/app",
                "SESSION_COOKIE_SECURE": True,
                "SESSION_COOKIE_SAMESITE": "Strict",
                "SESSION_COOKIE_HTTPONLY": False,
            },
            {
                "domain": "example.com",
                "path": "/app",
                "secure": True,
                "samesite": "Strict",
                "httponly": True,
            },
        ),
        (
            {
                "SESSION_COOKIE_SECURE": True,
                "SESSION_COOKIE_SAMESITE": "Strict",
                "PINNING_COOKIE_DOMAIN": "own.example.com",
                "PINNING_COOKIE_PATH": "/own",
                "PINNING_COOKIE_SECURE": False,
                "PINNING_COOKIE_SAMESITE": "None",
                "PINNING_COOKIE_HTTPONLY": False,
            },
            {
                "domain": "own.example.com",
                "path": "/own",
                "secure": "",
                "samesite": "None",
                "httponly": "",
            },
        ),
        ({"PINNING_COOKIE_SAMESITE": False}, {"samesite": ""}),
        ({"PINNING_SECONDS": 100}, {"max-age": 101}),
    ],
)
def test_cookie_attributes(
    visit: Visit, clock: FrozenDateTimeFactory, settings: Any, expected: dict[str, Any]
) -> None:
    """Same as the session cookie, unless set explicitly."""
    with override_settings(**settings):
        visit(write)
    cookie = visit.response.cookies["pinning"]
    assert {name: cookie[name] for name in expected} == expected


@override_settings(PINNING_COOKIE_NAME="other")
def test_cookie_name(visit: Visit) -> None:
    visit(write)
    assert set(visit.browser.cookies) == {"other"}
    assert visit() == "default"


def test_cookie_contains_only_the_pin(visit: Visit, clock: FrozenDateTimeFactory) -> None:
    visit(write)
    pins = tokens.loads(visit.browser.cookies["pinning"].value)
    assert {key.primary: pin.until for key, pin in pins.items()} == {"default": time.time() + 15}


@pytest.mark.parametrize(
    ("headers", "vary", "cache_control"),
    [
        ({}, "Cookie", {"private"}),
        ({"Vary": "Accept"}, "Accept, Cookie", {"private"}),
        ({"Vary": "cookie"}, "cookie", {"private"}),
        ({"Vary": "*"}, "*", {"private"}),
        ({"Cache-Control": "max-age=60"}, "Cookie", {"max-age=60", "private"}),
        ({"Cache-Control": "public, max-age=60"}, "Cookie", {"max-age=60", "private"}),
        ({"Cache-Control": "no-store"}, "Cookie", {"no-store", "private"}),
    ],
)
def test_response_with_the_cookie_is_private(
    browser: Browser, do: Callable[..., str], headers: Any, vary: str, cache_control: set[str]
) -> None:
    def action(request: Any) -> HttpResponse:
        write()
        return HttpResponse(headers=headers)

    response = browser.get(f"/sync/{do(action)}/")
    assert response.headers["Vary"] == vary
    assert set(response.headers["Cache-Control"].split(", ")) == cache_control


def test_response_without_the_cookie_is_unchanged(visit: Visit) -> None:
    """Shared caches may store it, also for a pinned client."""
    visit()
    assert not {"Vary", "Cache-Control", "Set-Cookie"} & set(visit.response.headers)
    visit(write)
    visit()
    assert not {"Vary", "Cache-Control", "Set-Cookie"} & set(visit.response.headers)
    assert not visit.response.cookies


# Window


def test_window_starts_at_the_last_write(visit: Visit, clock: FrozenDateTimeFactory) -> None:
    def action(request: Any) -> None:
        write()
        clock.tick(10)
        write()
        clock.tick(10)

    visit(action)
    clock.tick(4)
    assert visit() == "default"
    clock.tick(2)
    assert is_replica(visit())


def test_write_while_pinned_extends_the_pin(visit: Visit, clock: FrozenDateTimeFactory) -> None:
    visit(write)
    clock.tick(10)
    visit(write)
    clock.tick(10)
    assert visit() == "default"


def test_window_that_ended_before_the_response_sets_no_pin(
    visit: Visit, clock: FrozenDateTimeFactory
) -> None:
    visit(lambda request: (write(), clock.tick(20)))
    assert is_replica(visit())


@override_settings(PINNING_SECONDS=2)
def test_window_follows_the_setting(visit: Visit, clock: FrozenDateTimeFactory) -> None:
    visit(write)
    clock.tick(1.5)
    assert visit() == "default"
    clock.tick(1)
    assert is_replica(visit())


def test_cookie_kept_past_its_end_does_not_extend_the_pin(
    visit: Visit, clock: FrozenDateTimeFactory
) -> None:
    """The end is fixed at the write, even if a client ignores `max-age`."""
    visit(write)
    kept = visit.browser.cookies["pinning"].value
    clock.tick(16)
    visit.browser.cookies["pinning"] = kept
    assert is_replica(visit())


def test_reads_do_not_extend_the_pin(visit: Visit, clock: FrozenDateTimeFactory) -> None:
    visit(write)
    for _ in range(3):
        clock.tick(5)
        visit(None, "post")
    clock.tick(1)
    assert is_replica(visit())


@override_settings(PINNING_SECONDS=0)
def test_window_of_zero_pins_the_request_only(visit: Visit) -> None:
    assert visit(lambda request: (write(), where())[1]) == "default"
    assert is_replica(visit())


def test_unpin_deletes_the_cookie(visit: Visit) -> None:
    visit(write)
    assert is_replica(visit(lambda request: (unpin_this_request(), where())[1]))
    cookie = visit.response.cookies["pinning"]
    assert (cookie.value, cookie["max-age"], cookie["path"]) == ("", 0, "/")
    assert visit.response.headers["Vary"] == "Cookie"
    assert is_replica(visit())


def test_write_after_unpin_pins(visit: Visit) -> None:
    visit(write)
    visit(lambda request: (unpin_this_request(), write()))
    assert visit() == "default"


# Errors


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_view_that_raises_after_its_write_pins(
    new_browser: Callable[..., Browser], do: Callable[..., str], kind: str
) -> None:
    def action(request: Any) -> None:
        write()
        raise LookupError

    browser = new_browser(raise_request_exception=False)
    assert browser.get(f"/{kind}/{do(action)}/").status_code == 500
    assert "pinning" in browser.cookies
    assert browser.get(f"/{kind}/{do(lambda request: where())}/").content == b"default"
    assert entered_scope() is None


@pytest.mark.parametrize("is_async", [False, True])
def test_unhandled_error_saves_pins_and_propagates(kept: list[Any], is_async: bool) -> None:
    """For example an error of a middleware that Django does not convert to a response."""

    def fails(request: Any) -> HttpResponse:
        write()
        raise asyncio.CancelledError

    async def afails(request: Any) -> HttpResponse:
        await Book.objects.acreate(title="x")
        raise asyncio.CancelledError

    handler = PinningMiddleware(afails if is_async else fails)
    call = async_to_sync(handler.__acall__) if is_async else handler
    with pytest.raises(asyncio.CancelledError):
        call(RequestFactory().get("/"))
    ((response, pins),) = kept
    assert response is None
    assert list(pins) == [PinKey("default")]
    assert entered_scope() is None


@pytest.mark.parametrize("store", ["BrokenStore", "BrokenLateStore"])
@pytest.mark.parametrize("broken_first", [False, True])
def test_failing_store_is_logged_and_other_stores_save(
    visit: Visit, caplog: pytest.LogCaptureFixture, store: str, broken_first: bool
) -> None:
    paths = [COOKIE_STORE, f"tests.app.stores.{store}"]
    with (
        override_settings(PINNING_STORES=paths[::-1] if broken_first else paths),
        caplog.at_level(logging.ERROR, "pinning_middleware"),
    ):
        visit(write)
        assert visit.response.status_code == 200
        assert visit() == "default"
    said = [record.getMessage() for record in caplog.records]
    # Logged once a minute, regardless of the number of requests.
    assert [("load" in line, "save" in line) for line in said] == [(True, False), (False, True)]
    assert all(store in line for line in said)


# Streaming content


def streaming(is_async: bool, parts: Callable[[], Iterator[bytes]]) -> StreamingHttpResponse:
    async def aparts() -> AsyncIterator[bytes]:
        from asgiref.sync import sync_to_async

        content = parts()
        while (part := await sync_to_async(next)(content, None)) is not None:
            yield part

    return StreamingHttpResponse(aparts() if is_async else parts())


def body_of(browser: Browser, response: Any) -> bytes:
    if not browser.is_async:
        return b"".join(response.streaming_content)

    async def consume() -> bytes:
        return b"".join([part async for part in response.streaming_content])

    return async_to_sync(consume)()


@pytest.fixture
def stream(browser: Browser, do: Callable[..., str]) -> Callable[..., bytes]:
    """Return a function that streams chunks: an iterator (WSGI) or async iterator (ASGI)."""

    def run(parts: Callable[[], Iterator[bytes]], before: Any = None, method: str = "get") -> bytes:
        def action(request: Any) -> StreamingHttpResponse:
            if before is not None:
                before()
            return streaming(browser.is_async, parts)

        return body_of(browser, getattr(browser, method)(f"/sync/{do(action)}/"))

    return run


def placed() -> Iterator[bytes]:
    for _ in range(3):
        yield f"{where()} {is_pinned()}\n".encode()


@pytest.mark.parametrize(
    ("before", "method", "pinned"),
    [
        (None, "get", False),
        (write, "get", True),
        (pin_this_request, "get", True),
        (None, "post", 1),
    ],
)
def test_streaming_content_is_routed_like_its_request(
    browser: Browser, stream: Any, before: Any, method: str, pinned: bool
) -> None:
    lines = set(stream(placed, before, method).decode().splitlines())
    assert len(lines) == 1
    place, is_pinned_there = lines.pop().split()
    assert (place == "default", is_pinned_there) == (bool(pinned), str(bool(pinned)))
    assert entered_scope() is None


def test_inherited_pin_applies_to_streaming_content(stream: Any, browser: Browser, do: Any) -> None:
    browser.get(f"/sync/{do(write)}/")
    assert set(stream(placed).splitlines()) == {b"default True"}


def test_write_of_streaming_content_is_saved_by_stores_without_a_response(
    kept: list[Any], stream: Any, browser: Browser
) -> None:
    """The cookie is already sent; other stores can still save."""

    def parts() -> Iterator[bytes]:
        yield where().encode() + b" "
        write()
        yield where().encode()

    before, after = stream(parts).split()
    assert is_replica(before.decode())
    assert after == b"default"
    ((response, pins),) = kept
    assert response is None
    assert list(pins) == [PinKey("default")]
    assert not browser.cookies


def test_streaming_content_that_only_reads_saves_nothing(kept: list[Any], stream: Any) -> None:
    """An empty save would delete the pins of a parallel request from the store."""
    stream(placed)
    assert kept == []


def test_write_before_streaming_is_saved_once(kept: list[Any], stream: Any) -> None:
    stream(placed, write)
    assert len(kept) == 1
    assert kept[0][0] is not None


def test_abandoned_streaming_content_is_saved(kept: list[Any], browser: Browser, do: Any) -> None:
    """The client disconnects during the response."""

    def parts() -> Iterator[bytes]:
        write()
        yield b"one"
        yield b"two"

    response = browser.get(f"/sync/{do(lambda request: streaming(browser.is_async, parts))}/")
    content = response.streaming_content

    async def disconnect() -> None:
        assert await anext(content) == b"one"
        await content.aclose()

    if browser.is_async:
        async_to_sync(disconnect)()
    else:
        assert next(iter(content)) == b"one"
        response.close()
    assert [pins.keys() for _, pins in kept] == [{PinKey("default")}]
    assert entered_scope() is None


def test_write_during_the_save_of_streaming_content_is_saved(
    monkeypatch: pytest.MonkeyPatch, kept: list[Any], stream: Any
) -> None:
    contexts: list[contextvars.Context] = []
    save = stores.RecordingStore.save

    def save_slowly(self: Any, *args: Any) -> None:
        save(self, *args)
        if len(kept) == 1:
            # A thread of the request, while its content ends.
            with ThreadPoolExecutor(1) as threads:
                threads.submit(contexts[0].run, write).result(20)

    def parts() -> Iterator[bytes]:
        contexts.append(contextvars.copy_context())
        write()
        yield b"written"

    monkeypatch.setattr(stores.RecordingStore, "save", save_slowly)
    stream(parts)
    assert len(kept) == 2


def test_scope_is_inactive_between_chunks(browser: Browser, do: Any) -> None:
    """Other work of the same thread between two chunks is not part of the request."""

    def parts() -> Iterator[bytes]:
        yield b"one"
        write()
        yield b"two"

    response = browser.get(f"/sync/{do(lambda request: streaming(browser.is_async, parts))}/")
    content = response.streaming_content

    async def consume() -> list[Any]:
        return [(entered_scope(), is_pinned()) async for _ in content]

    if browser.is_async:
        seen = async_to_sync(consume)()
    else:
        seen = [(entered_scope(), is_pinned()) for _ in content]
    assert seen == [(None, False), (None, False)]


def test_failing_streaming_content_is_saved_and_closes_the_scope(
    kept: list[Any], stream: Any, browser: Browser
) -> None:
    def parts() -> Iterator[bytes]:
        write()
        yield b"one"
        raise LookupError

    with pytest.raises(LookupError):
        stream(parts)
    assert len(kept) == 1
    assert entered_scope() is None


@pytest.mark.parametrize("is_async", [False, True])
def test_file_response_is_not_wrapped(is_async: bool) -> None:
    """Servers may then use `sendfile`."""
    file = io.BytesIO(b"content")

    def view(request: Any) -> FileResponse:
        write()
        return FileResponse(file)

    async def aview(request: Any) -> FileResponse:
        await Book.objects.acreate(title="x")
        return FileResponse(file)

    handler = PinningMiddleware(aview if is_async else view)
    call = async_to_sync(handler.__acall__) if is_async else handler
    response = call(RequestFactory().get("/"))
    assert response.file_to_stream is file
    assert b"".join(response.streaming_content) == b"content"
    assert "pinning" in response.cookies


# Scopes of requests


def test_request_leaves_its_thread_unchanged(visit: Visit) -> None:
    visit(write)
    assert entered_scope() is None
    assert not is_pinned()


def test_request_inside_a_scope_restores_it(visit: Visit) -> None:
    """Django's test client in a shell or a test that has written."""
    write()
    outer = entered_scope()
    assert is_replica(visit())
    assert entered_scope() is outer
    assert is_pinned()


def test_parallel_requests_of_one_user(visit: Visit, clock: FrozenDateTimeFactory) -> None:
    """A read does not consume the pin: all parallel requests use it, in any order."""
    visit(write)
    assert [visit() for _ in range(5)] == ["default"] * 5


def test_head_is_routed_like_get(visit: Visit) -> None:
    assert is_replica(visit(None, "head"))
    visit(write, "head")
    assert visit(None, "head") == "default"


def test_sync_middleware_in_between_under_asgi(do: Any) -> None:
    """Under ASGI, Django then runs the rest of the request in a thread."""
    browser = Browser(is_async=True)
    with override_settings(MIDDLEWARE=[MIDDLEWARE, "tests.app.middleware.SyncMiddleware"]):
        browser.get(f"/async/{do(write)}/")
        assert browser.get(f"/async/{do(lambda request: where())}/").content == b"default"
        browser.cookies.clear()
        assert is_replica(browser.get(f"/sync/{do(lambda request: where())}/").content.decode())


# Overhead


def test_unpinned_request_adds_no_query(visit: Visit) -> None:
    with ExitStack() as stack:
        captured = [
            stack.enter_context(CaptureQueriesContext(connections[alias])) for alias in connections
        ]
        visit()
        visit(None, "post")
    assert [len(queries) for queries in captured] == [0] * len(captured)


@pytest.mark.parametrize("action", [where, lambda: use_primary(where)(), pin_this_request])
def test_async_request_uses_no_thread(
    monkeypatch: pytest.MonkeyPatch, do: Any, action: Callable[[], Any]
) -> None:
    """Neither without a pin, nor with a new pin that needs no position."""

    async def act(request: Any) -> HttpResponse:
        action()
        return HttpResponse()

    async def handle() -> Any:
        monkeypatch.setattr(SyncToAsync, "__call__", hop)
        try:
            return await handler.get_response_async(AsyncRequestFactory().get(address))
        finally:
            monkeypatch.undo()

    def hop(self: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"hopped to a thread for {self.func}")

    address = f"/async/{do(act)}/"
    with override_settings(MIDDLEWARE=[MIDDLEWARE]):
        handler = BaseHandler()
        handler.load_middleware(is_async=True)
        response = async_to_sync(handle)()
    assert response.status_code == 200
    assert ("pinning" in response.cookies) is (action is pin_this_request)


def test_inherited_pin_uses_no_thread(monkeypatch: pytest.MonkeyPatch, do: Any) -> None:
    factory = AsyncRequestFactory()
    factory.cookies["pinning"] = tokens.dumps({PinKey("default"): Pin(time.time() + 60)})
    seen = []

    async def act(request: Any) -> HttpResponse:
        seen.append(where())
        return HttpResponse()

    async def handle() -> Any:
        request = factory.get(address)
        monkeypatch.setattr(SyncToAsync, "__call__", None)
        try:
            return await handler.get_response_async(request)
        finally:
            monkeypatch.undo()

    address = f"/async/{do(act)}/"
    with override_settings(MIDDLEWARE=[MIDDLEWARE]):
        handler = BaseHandler()
        handler.load_middleware(is_async=True)
        async_to_sync(handle)()
    assert seen == ["default"]


# Server-Timing


class StaffVisit:
    """A view that loads the user, as Django's authentication does on first use."""

    def __init__(self, is_staff: bool, is_active: bool = True) -> None:
        self.is_staff, self.is_active = is_staff, is_active

    def __call__(self, request: Any) -> None:
        request._cached_user = self
        Book.objects.count()
        with use_primary():
            Book.objects.count()


def timing(visit: Visit, action: Callable[[Any], Any]) -> str | None:
    visit(action)
    header: str | None = visit.response.headers.get("Server-Timing")
    return header


def test_server_timing_is_sent_to_staff(visit: Visit) -> None:
    found = timing(visit, StaffVisit(is_staff=True))
    assert found is not None
    assert re.fullmatch(r'pinning;desc="replica\d: round_robin, default: use_primary"', found)


@pytest.mark.parametrize("user", [StaffVisit(False), StaffVisit(True, is_active=False)])
def test_server_timing_is_not_sent_to_other_users(visit: Visit, user: StaffVisit) -> None:
    assert timing(visit, user) is None
    assert timing(visit, lambda request: Book.objects.count()) is None


@override_settings(DEBUG=True)
def test_server_timing_is_sent_to_everyone_in_debug(visit: Visit) -> None:
    assert timing(visit, lambda request: Book.objects.count()) is not None
    assert timing(visit, lambda request: None) is None


@override_settings(DEBUG=True)
def test_server_timing_keeps_other_entries(visit: Visit) -> None:
    def view(request: Any) -> HttpResponse:
        Book.objects.count()
        return HttpResponse(headers={"Server-Timing": "db;dur=5"})

    visit.browser.get(f"/{visit.kind}/{visit._do(view)}/")
    response = visit.browser.get(f"/{visit.kind}/{visit._do(view)}/")
    assert response.headers["Server-Timing"].startswith('db;dur=5, pinning;desc="replica')


# Blocks left open by a request


@pytest.mark.parametrize("verb", [ignore_writes, use_replica])
def test_open_block_is_closed_at_the_end_of_the_request(verb: Any, do: Any) -> None:
    """By a generator that is not closed before the next request of the same thread."""
    left: list[Iterator[int]] = []

    def rows() -> Iterator[int]:
        with verb():
            yield 1
            yield 2

    def preview(request: Any) -> str:
        left.append(rows())
        next(left[0])
        return "done"

    places: list[str] = []

    def act(request: Any) -> str:
        write()
        places.append(where())
        return "done"

    handler = WSGIHandler()
    preview_address, address = f"/sync/{do(preview)}/", f"/sync/{do(act)}/"

    def get(path: str) -> list[str]:
        headers: list[Any] = []
        environ = RequestFactory().get(path).environ
        handler(environ, lambda status, given: headers.extend(given)).close()
        return [value for name, value in headers if name == "Set-Cookie"]

    assert get(preview_address) == []
    assert len(get(address)) == 1
    assert places == ["default"]
    left[0].close()


def test_write_in_finally_of_an_abandoned_stream_is_saved(
    kept: list[Any], browser: Browser, do: Any
) -> None:
    scopes: list[bool] = []

    def end() -> None:
        scopes.append(entered_scope() is not None)
        write()

    def parts() -> Iterator[bytes]:
        try:
            yield b"one"
            yield b"two"
        finally:
            end()

    async def aparts() -> AsyncIterator[bytes]:
        try:
            yield b"one"
            yield b"two"
        finally:
            await sync_to_async(end)()

    body = aparts if browser.is_async else parts
    response = browser.get(f"/sync/{do(lambda request: StreamingHttpResponse(body()))}/")
    content = response.streaming_content

    async def disconnect() -> None:
        await anext(content)
        await content.aclose()
        # The event loop closes the source generator when it is collected.
        await response._iterator.aclose()
        for _ in range(10_000):
            if not kept:
                await asyncio.sleep(0.001)

    if browser.is_async:
        async_to_sync(disconnect)()
    else:
        next(iter(content))
        response.close()
    assert scopes == [True]
    assert [pins.keys() for _, pins in kept] == [{PinKey("default")}]


def test_scope_inside_streaming_content_spans_all_chunks(stream: Any) -> None:
    tokens_left: list[str | None] = []

    def parts() -> Iterator[bytes]:
        with pinning_scope() as scope:
            yield str(entered_scope() is scope._scope).encode()
            yield str(entered_scope() is scope._scope).encode()
            write()
        tokens_left.append(scope.token)

    assert stream(parts) == b"TrueTrue"
    assert tokens_left[0]
    assert entered_scope() is None


def test_keys_pinned_by_streaming_content_are_saved(stream: Any) -> None:
    def parts() -> Iterator[bytes]:
        yield b"one"
        pin_keys("order:42")

    stream(parts)
    assert set(keyed.load_pins("key", ["order:42"])) == {PinKey("default")}


# The staff's Server-Timing header


class QueryingUser:
    is_active = True

    @property
    def is_staff(self) -> bool:
        return Book.objects.exists()


def test_property_of_the_user_that_queries_prevents_no_pin(browser: Browser, do: Any) -> None:
    """In an event loop, Django refuses the query."""

    def act(request: Any) -> str:
        request._cached_user = QueryingUser()
        return write()

    browser.get(f"/sync/{do(act)}/")
    assert "pinning" in browser.cookies
