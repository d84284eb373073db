"""The stores, the user key, and keys of shared objects."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth import alogin, alogout, login, logout
from django.contrib.auth.models import User
from django.contrib.sessions.backends.cache import SessionStore as CacheSession
from django.core.management import call_command
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, RequestFactory, TestCase, override_settings
from django.test.utils import CaptureQueriesContext
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import (
    afollow_keys,
    follow_keys,
    is_pinned,
    pin_keys,
    pin_this_request,
    pinning_scope,
    tokens,
    unpin_this_request,
)
from pinning_middleware.pins import Pin, PinKey, Pins, Position, pack, unpack
from pinning_middleware.stores import CacheStore, CookieStore, HeaderStore, auser_key, user_key
from pinning_middleware.stores import cache as keyed
from pinning_middleware.testing import StoreContract, replicas
from pinning_middleware.utils.counters import rejected_tokens
from tests.app.models import Book
from tests.caches import calls
from tests.conftest import MIDDLEWARE, Browser, Visit, is_replica, where
from tests.contrib.pages import load
from tests.valkey import LOCMEM, pins_in, redis_cache, running, valkey

__all__ = ["valkey"]

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

DEFAULT, USERS = PinKey("default"), PinKey("users")
COOKIE = "pinning_middleware.stores.CookieStore"
HEADER = "pinning_middleware.stores.HeaderStore"
CACHE = "pinning_middleware.stores.CacheStore"
# Session engines without replicas.
SESSIONS = "django.contrib.sessions.backends.cache"


def write(request: Any = None) -> str:
    Book.objects.create(title="x")
    return "written"


def pinned(request: Any = None) -> str:
    return str(is_pinned())


def send(visit: Visit, action: Callable[..., Any], method: str = "get", **kwargs: Any) -> Any:
    """Run the action in a view, sync or async, and return the response."""
    address = f"/{visit.kind}/{visit._do(action)}/"
    visit.response = getattr(visit.browser, method)(address, **kwargs)
    return visit.response


# The contract


class TestCookieStore(StoreContract):
    store = CookieStore()


class TestHeaderStore(StoreContract):
    store = HeaderStore()

    def next_request(self, request: HttpRequest, response: HttpResponse) -> HttpRequest:
        sent = request.META.get("HTTP_PINNING_TOKEN", "")
        return RequestFactory().get(
            "/", HTTP_PINNING_TOKEN=response.headers.get("Pinning-Token", sent)
        )


class CacheContract(StoreContract):
    store = CacheStore()
    shared = True

    def new_request(self) -> HttpRequest:
        request = super().new_request()
        request.user = User(pk=7)
        return request


class TestCacheStore(CacheContract):
    pass


class TestCacheStoreOnValkey(CacheContract):
    @pytest.fixture(autouse=True)
    def on_valkey(self, valkey: str) -> Iterator[None]:
        from django.core.cache import caches

        with pins_in(redis_cache(valkey)):
            caches["pins"].clear()
            yield


# Clocks that differ


@pytest.mark.parametrize("is_rewritten_with_another", [True, False])
def test_cookie_keeps_the_position_of_a_writer_whose_clock_is_behind(
    is_rewritten_with_another: bool,
) -> None:
    """By more than the window: the browser measures the age of the cookie by its own clock."""
    store, now = CookieStore(), time.time()
    behind = Pin(now - 60, None, Position({"a": 1}))
    other = {USERS: Pin(now + 15, None, Position({"b": 1}))}
    both = {DEFAULT: behind, **other}
    before, after = both, {DEFAULT: behind}
    if is_rewritten_with_another:
        before, after = after, before
    request = RequestFactory().get("/")
    request.COOKIES["pinning"] = tokens.dumps(before)
    assert set(store.load(request)) == set(before)
    response = HttpResponse()
    store.save(request, response, after)
    cookie = response.cookies["pinning"]
    assert set(tokens.loads(cookie.value)) == set(after)
    assert 15 <= cookie["max-age"] <= 16


# The example of docs/reference/stores.md: a custom store.


SessionStore: Any = load("reference/stores.md", "Custom stores")[""].SessionStore


class TestSessionStore(StoreContract, TestCase):
    store = SessionStore()

    def new_request(self) -> HttpRequest:
        request = super().new_request()
        request.session = CacheSession()
        request.session.create()
        return request


@override_settings(PINNING_STORES=["tests.test_stores.SessionStore"], SESSION_ENGINE=SESSIONS)
def test_custom_store_in_the_session(visit: Visit) -> None:
    assert visit(lambda request: write() and where()) == "default"
    assert is_replica(visit()), "no session, no pin"
    visit.browser.client.force_login(User.objects.create_user("ada"))
    visit(write)
    assert visit() == "default"
    visit(lambda request: unpin_this_request())
    assert is_replica(visit())
    assert "pinning" not in visit.browser.cookies


# Defects that the contract detects


class ForgetfulStore(SessionStore):
    def save(self, request: HttpRequest, response: Any, pins: Pins) -> None:
        pass


class LateStore(SessionStore):
    """A store that changes the session after it was saved."""

    def save(self, request: HttpRequest, response: Any, pins: Pins) -> None:
        request.session["pins"] = pack(pins)


class OneShotStore(SessionStore):
    """A store whose reads consume the pin, like Makara."""

    def load(self, request: HttpRequest) -> Pins:
        pins = request.session.pop("pins", {})
        request.session.save()
        return unpack(pins)


class StubbornStore(SessionStore):
    def save(self, request: HttpRequest, response: Any, pins: Pins) -> None:
        if pins:
            super().save(request, response, pins)


class NeedyStore(SessionStore):
    """A store that requires an unsent response in each save."""

    def save(self, request: HttpRequest, response: Any, pins: Pins) -> None:
        response.headers["Pins"] = "kept"
        super().save(request, response, pins)


class TimelessStore(SessionStore):
    """A store with whole seconds and without positions."""

    def save(self, request: HttpRequest, response: Any, pins: Pins) -> None:
        pins = {key: Pin(float(int(pin.until))) for key, pin in pins.items()}
        super().save(request, response, pins)


@pytest.mark.parametrize(
    "broken", [ForgetfulStore, LateStore, OneShotStore, StubbornStore, NeedyStore, TimelessStore]
)
def test_contract_fails_for_a_broken_store(broken: type[SessionStore]) -> None:
    class Broken(TestSessionStore):
        store = broken()

    failed = []
    for name in dir(Broken):
        if name.startswith("test_"):
            try:
                getattr(Broken(name), name)()
            except (AssertionError, AttributeError):
                failed.append(name)
    assert failed


# The header


class Token:
    """A client without cookies that sends the last received token header."""

    def __init__(self, visit: Visit) -> None:
        self.visit, self.token = visit, ""

    def __call__(self, action: Callable[..., Any] | None = None, method: str = "get") -> Any:
        headers = {"Pinning-Token": self.token} if self.token else {}
        result = self.visit(action, method, headers=headers)
        self.visit.browser.cookies.clear()
        self.token = self.visit.response.headers.get("Pinning-Token", self.token)
        return result

    @property
    def response(self) -> Any:
        return self.visit.response


@pytest.fixture
def client(visit: Visit) -> Iterator[Token]:
    with override_settings(PINNING_STORES=[HEADER]):
        yield Token(visit)


def test_client_with_token_header_reads_its_writes(client: Token) -> None:
    assert is_replica(client())
    assert "Pinning-Token" not in client.response.headers
    client(write, "post")
    assert set(tokens.loads(client.token)) == {DEFAULT}
    assert not client.response.cookies
    assert client() == "default"
    assert "Pinning-Token" not in client.response.headers, "nothing is new"
    assert client() == "default", "a read uses nothing up"


def test_client_without_token_header_reads_a_replica(client: Token) -> None:
    client(write, "post")
    client.token = ""
    assert is_replica(client())


def test_response_with_a_token_is_private(client: Token) -> None:
    client(write)
    assert client.response.headers["Vary"] == "Pinning-Token"
    assert client.response.headers["Cache-Control"] == "private"
    client()
    assert "Cache-Control" not in client.response.headers


def test_cache_headers_of_the_view_are_kept(client: Token) -> None:
    def act(request: HttpRequest) -> HttpResponse:
        write()
        return HttpResponse(headers={"Vary": "Accept", "Cache-Control": "public, max-age=60"})

    response = send(client.visit, act)
    assert response.headers["Vary"] == "Accept, Pinning-Token"
    said = set(re.split(", ?", response.headers["Cache-Control"]))
    assert said == {"private", "max-age=60"}


def test_headers_of_shared_caches_are_removed(visit: Visit) -> None:
    def act(request: HttpRequest) -> HttpResponse:
        if request.method == "POST":
            write()
        return HttpResponse(
            headers={
                "Cache-Control": "Public, max-age=60, S-MaxAge=600",
                "CDN-Cache-Control": "max-age=600",
                "Cloudflare-CDN-Cache-Control": "max-age=600",
                "Surrogate-Control": "max-age=600",
                "X-Accel-Expires": "600",
            }
        )

    read = send(visit, act)
    assert read.headers["X-Accel-Expires"] == "600"
    assert "S-MaxAge=600" in read.headers["Cache-Control"]
    assert "Vary" not in read.headers
    written = send(visit, act, "post")
    said = set(re.split(", ?", written.headers["Cache-Control"]))
    assert said == {"private", "max-age=60"}
    assert written.headers["Vary"] == "Cookie"
    assert not [name for name in written.headers if "CDN" in name or name.startswith(("S", "X-A"))]


def test_unpinning_deletes_the_cookie_and_an_empty_one_is_valid(visit: Visit) -> None:
    before = sum(rejected_tokens.values())
    visit(write)
    visit(lambda request: unpin_this_request())
    assert visit.response.cookies["pinning"].value == ""
    assert visit.response.headers["Vary"] == "Cookie"
    assert is_replica(visit())
    visit(lambda request: unpin_this_request())
    assert not visit.response.cookies
    assert sum(rejected_tokens.values()) == before


def test_unpinning_one_pool_keeps_the_other_in_the_cookie(visit: Visit) -> None:
    with override_settings(
        PINNING_REPLICAS={"default": ["replica1", "replica2"], "users": ["users_replica"]}
    ):
        visit(lambda request: pin_this_request())
        visit(lambda request: unpin_this_request("users"))
        assert set(tokens.loads(visit.response.cookies["pinning"].value)) == {DEFAULT}
        assert visit() == "default"


def test_unpinning_sends_an_empty_header(client: Token) -> None:
    client(write)
    client(lambda request: unpin_this_request())
    assert client.response.headers["Pinning-Token"] == ""
    assert client.response.headers["Cache-Control"] == "private"
    assert is_replica(client())


@pytest.mark.parametrize("token", ["nonsense", "e30:forged", "x" * 5000])
def test_forged_token_header_is_ignored_and_counted(
    client: Token, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = sum(rejected_tokens.values())
    client.token = token
    assert is_replica(client())
    assert client.response.status_code == 200
    assert sum(rejected_tokens.values()) == before + 1


def test_token_header_expires_with_its_window(client: Token, clock: FrozenDateTimeFactory) -> None:
    client(write)
    clock.tick(14)
    assert client() == "default"
    clock.tick(2)
    assert is_replica(client())


def test_header_name_setting(visit: Visit) -> None:
    with override_settings(PINNING_STORES=[HEADER], PINNING_HEADER_NAME="X-Read-After"):
        visit(write)
        assert visit.response.headers["Vary"] == "X-Read-After"
        token = visit.response.headers["X-Read-After"]
        assert visit(headers={"X-Read-After": token}) == "default"


def test_cookie_and_header_stores_together(visit: Visit) -> None:
    with override_settings(PINNING_STORES=[COOKIE, HEADER]):
        visit(write)
        token = visit.response.headers["Pinning-Token"]
        assert visit.response.cookies["pinning"].value == token
        assert {"Cookie", "Pinning-Token"} <= set(visit.response.headers["Vary"].split(", "))
        assert visit() == "default"
        visit.browser.cookies.clear()
        assert is_replica(visit())
        assert visit(headers={"Pinning-Token": token}) == "default"


def test_token_of_a_response_continues_in_a_scope(visit: Visit) -> None:
    """A service calls another one with its inherited pins and its writes."""
    with override_settings(PINNING_STORES=[HEADER]):
        visit(write)
        with pinning_scope(visit.response.headers["Pinning-Token"]) as scope:
            assert where() == "default"
            assert set(tokens.loads(scope.token or "")) == {DEFAULT}


# The cache: a user on all devices


@pytest.fixture(params=["locmem", "valkey"])
def by_user(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pins follow the user, on each kind of cache."""
    from django.core.cache import caches

    if request.param == "valkey":
        entry = redis_cache(request.getfixturevalue("valkey"))
    else:
        entry = {"BACKEND": "tests.caches.CountingCache", "LOCATION": "pins"}
    with pins_in(entry, PINNING_STORES=[CACHE], SESSION_ENGINE=SESSIONS):
        caches["pins"].clear()
        calls.clear()
        yield


@pytest.fixture
def ada() -> User:
    return User.objects.create_user("ada")


@pytest.fixture
def phone(visit: Visit, new_browser: Callable[..., Browser], do: Callable[..., str]) -> Visit:
    """A different device than that of ``visit``."""
    return Visit(new_browser(), visit.kind, do)


def test_user_is_pinned_on_another_device(
    by_user: None, visit: Visit, phone: Visit, ada: User
) -> None:
    visit.browser.client.force_login(ada)
    phone.browser.client.force_login(ada)
    assert is_replica(phone())
    visit(write)
    assert visit() == "default"
    assert phone() == "default"
    assert phone(lambda request: Book.objects.count()) == 1
    assert "pinning" not in visit.response.cookies
    assert "Cache-Control" not in visit.response.headers, "nothing of the user is in it"


def test_unrelated_user_is_not_pinned(by_user: None, visit: Visit, phone: Visit, ada: User) -> None:
    visit.browser.client.force_login(ada)
    visit(write)
    assert is_replica(phone())
    phone.browser.client.force_login(User.objects.create_user("grace"))
    assert is_replica(phone())


def test_pin_of_a_user_expires_with_its_window(
    by_user: None, visit: Visit, ada: User, clock: FrozenDateTimeFactory
) -> None:
    visit.browser.client.force_login(ada)
    visit(write)
    clock.tick(14)
    assert visit() == "default"
    clock.tick(2)
    assert is_replica(visit())


def test_unpinning_applies_to_all_devices(
    by_user: None, visit: Visit, phone: Visit, ada: User
) -> None:
    visit.browser.client.force_login(ada)
    phone.browser.client.force_login(ada)
    visit(write)
    phone(lambda request: unpin_this_request())
    assert is_replica(visit())


def test_unpinning_by_an_older_request_keeps_a_newer_pin(
    by_user: None, visit: Visit, phone: Visit, ada: User
) -> None:
    """A request that began before the write of another device, and unpins after it."""
    visit.browser.client.force_login(ada)
    phone.browser.client.force_login(ada)
    visit(write)

    def slow(request: Any) -> None:
        with ThreadPoolExecutor(1) as other:
            other.submit(_closing, lambda: visit(write)).result(30)
        unpin_this_request()

    phone(slow)
    assert visit() == "default"


def _closing(function: Callable[[], Any]) -> Any:
    try:
        return function()
    finally:
        connections.close_all()


def test_parallel_requests_of_a_user_merge_their_pins(
    by_user: None, visit: Visit, phone: Visit, ada: User
) -> None:
    """The pin of the request that ended first is not overwritten by the other."""
    visit.browser.client.force_login(ada)
    phone.browser.client.force_login(ada)

    def outer(request: Any) -> None:
        write()
        with ThreadPoolExecutor(1) as other:
            other.submit(_closing, lambda: phone(_write_far)).result(30)

    visit(outer)
    (found,) = keyed.load_pins("user", [str(ada.pk)]).values()
    assert found.until > _far() - 100


def _far() -> float:
    return time.time() + 1000


def _write_far(request: Any) -> None:
    pin_this_request(seconds=1000)


def test_anonymous_user_causes_no_cache_lookup(visit: Visit) -> None:
    counting = {"BACKEND": "tests.caches.CountingCache", "LOCATION": "counted"}
    with pins_in(counting, PINNING_STORES=[COOKIE, CACHE]):
        calls.clear()
        with CaptureQueriesContext(connections["default"]) as queries:
            assert is_replica(visit())
            assert is_replica(visit())
        assert not calls
        assert not queries.captured_queries
        visit(write)
        assert visit() == "default", "the cookie serves"
        assert not calls


def test_session_in_the_database_is_read_once(visit: Visit, ada: User) -> None:
    """The session is read before the pins are loaded, and only once."""
    with pins_in({**LOCMEM, "LOCATION": "pins"}, PINNING_STORES=[CACHE]):
        visit.browser.client.force_login(ada)
        replicas.catch_up()
        visit(write)
        with (
            CaptureQueriesContext(connections["replica1"]) as one,
            CaptureQueriesContext(connections["replica2"]) as two,
        ):
            assert visit() == "default"
        reads = [
            query["sql"]
            for query in (*one.captured_queries, *two.captured_queries)
            if "django_session" in query["sql"]
        ]
        assert len(reads) <= 1, "in a thread's own connection none are seen"


def test_login_request_pins_the_user(by_user: None, visit: Visit, phone: Visit, ada: User) -> None:
    """The user key is computed again when pins are saved."""

    async def alog_in(request: Any) -> None:
        await alogin(request, ada, "django.contrib.auth.backends.ModelBackend")
        await sync_to_async(write)()

    def log_in(request: Any) -> None:
        login(request, ada, "django.contrib.auth.backends.ModelBackend")
        write()

    send(visit, alog_in if visit.kind == "async" else log_in, "post")
    assert visit() == "default"
    phone.browser.client.force_login(ada)
    assert phone() == "default"


def test_logout_request_pins_the_user(by_user: None, visit: Visit, phone: Visit, ada: User) -> None:
    """The user is pinned on other devices, where they are still logged in."""

    async def alog_out(request: Any) -> None:
        await sync_to_async(write)()
        await alogout(request)

    def log_out(request: Any) -> None:
        write()
        logout(request)

    for client in (visit.browser.client, phone.browser.client):
        client.force_login(ada)
    send(visit, alog_out if visit.kind == "async" else log_out, "post")
    assert phone() == "default"


def test_user_key_does_not_make_the_response_vary_by_cookie(
    by_user: None, visit: Visit, ada: User
) -> None:
    """Computing the user key does not count as access to the session."""
    visit.browser.client.force_login(ada)
    visit()
    assert "Cookie" not in visit.response.headers.get("Vary", "")


def test_keys_outside_a_scope_are_saved_after_the_transaction_of_each_pool() -> None:
    two = {"default": ["replica1"], "users": ["users_replica"]}
    with pins_in({**LOCMEM, "LOCATION": "pins"}, PINNING_REPLICAS=two):
        with transaction.atomic(using="users"):
            pin_keys("order:of-two-pools")
            assert set(keyed.load_pins("key", ["order:of-two-pools"])) == {DEFAULT}
        assert set(keyed.load_pins("key", ["order:of-two-pools"])) == {DEFAULT, USERS}


def test_user_without_a_session_is_pinned(by_user: None, visit: Visit, ada: User) -> None:
    """For example a user that a middleware authenticates by a token."""
    with override_settings(MIDDLEWARE=[MIDDLEWARE, "tests.app.middleware.SyncMiddleware"]):

        def act(request: Any) -> str:
            request.user = ada
            return write()

        visit(act)
        assert set(keyed.load_pins("user", [str(ada.pk)])) == {DEFAULT}


def test_user_of_the_request_takes_precedence_over_the_session(
    by_user: None, visit: Visit, ada: User
) -> None:
    grace = User.objects.create_user("grace")
    visit.browser.client.force_login(ada)

    def act(request: Any) -> str:
        request.user = grace
        return write()

    visit(act)
    assert set(keyed.load_pins("user", [str(grace.pk)])) == {DEFAULT}
    assert keyed.load_pins("user", [str(ada.pk)]) == {}


def test_pins_in_a_database_cache(visit: Visit, phone: Visit, ada: User) -> None:
    """No replica has the table, and saving or loading pins is not a write."""
    table = {"BACKEND": "django.core.cache.backends.db.DatabaseCache", "LOCATION": "pins"}
    with pins_in(table, PINNING_STORES=[CACHE], SESSION_ENGINE=SESSIONS):
        call_command("createcachetable", verbosity=0)
        try:
            visit.browser.client.force_login(ada)
            phone.browser.client.force_login(ada)
            assert is_replica(phone())
            visit(write)
            assert phone() == "default"
            with pinning_scope(isolated=True) as scope:
                follow_keys("order:42")
                keyed.save_pins("key", ["order:42"], {DEFAULT: Pin(time.time() + 9)})
                assert is_replica(where())
            assert scope.pins == {}
            assert set(keyed.load_pins("key", ["order:42"])) == {DEFAULT}
        finally:
            with connections["default"].cursor() as cursor:
                cursor.execute("DROP TABLE pins")


def test_write_of_a_streaming_body_pins_the_user(
    by_user: None, visit: Visit, phone: Visit, ada: User
) -> None:
    """The response is already sent; the cache can still save."""
    visit.browser.client.force_login(ada)
    phone.browser.client.force_login(ada)

    async def abody() -> AsyncIterator[bytes]:
        yield (await sync_to_async(write)()).encode()

    def body() -> Iterator[bytes]:
        yield write().encode()

    def act(request: Any) -> StreamingHttpResponse:
        return StreamingHttpResponse(abody() if visit.browser.is_async else body())

    response = send(visit, act)
    assert is_replica(phone())
    content = response.streaming_content
    if visit.browser.is_async:
        assert async_to_sync(_next_part)(content) == b"written"
    else:
        assert next(content) == b"written"
    if visit.browser.is_async:
        async_to_sync(_close)(content)
    else:
        response.close()
    assert phone() == "default"


async def _next_part(content: AsyncIterator[bytes]) -> bytes:
    return await anext(content)


async def _close(content: Any) -> None:
    await content.aclose()


def test_view_that_raises_after_a_write_pins_the_user(
    by_user: None, visit: Visit, phone: Visit, ada: User
) -> None:
    visit.browser.client.force_login(ada)
    phone.browser.client.force_login(ada)
    visit.browser.client.raise_request_exception = False

    def act(request: Any) -> None:
        write()
        raise RuntimeError("after the write")

    assert send(visit, act).status_code == 500
    assert phone() == "default"


# PINNING_USER_KEY


class ForeignSession:
    """A session that is not derived from Django's."""

    session_key = "x"

    def __init__(self, **data: str) -> None:
        self.data = data

    def __getitem__(self, name: str) -> str:
        return self.data[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.data.get(name, default)


@pytest.mark.parametrize(
    ("data", "key"), [({"_auth_user_id": "7"}, "7"), ({}, None)], ids=["user", "anonymous"]
)
def test_user_key_reads_a_session_that_is_not_derived_from_djangos(
    data: dict[str, str], key: str | None
) -> None:
    request = RequestFactory().get("/")
    request.session = ForeignSession(**data)  # type: ignore[assignment]
    assert user_key(request) == key
    assert async_to_sync(auser_key)(request) == key


def test_stores_declare_whether_they_need_a_response() -> None:
    assert CookieStore.needs_response
    assert HeaderStore.needs_response
    assert not CacheStore.needs_response


def by_header(request: HttpRequest) -> str | None:
    return request.headers.get("Tenant")


async def aby_header(request: HttpRequest) -> str | None:
    return by_header(request)


@pytest.mark.parametrize("name", ["by_header", "aby_header"])
def test_custom_user_key(by_user: None, visit: Visit, phone: Visit, name: str) -> None:
    with override_settings(PINNING_USER_KEY=f"tests.test_stores.{name}"):
        visit(write, headers={"Tenant": "acme"})
        assert phone(headers={"Tenant": "acme"}) == "default"
        assert is_replica(phone(headers={"Tenant": "other"}))
        assert is_replica(phone())


def broken_key(request: HttpRequest) -> str | None:
    raise LookupError("no key today")


def test_error_of_user_key_is_logged_and_other_stores_load(
    by_user: None, visit: Visit, caplog: pytest.LogCaptureFixture
) -> None:
    with override_settings(
        PINNING_USER_KEY="tests.test_stores.broken_key", PINNING_STORES=[COOKIE, CACHE]
    ):
        visit(write)
        assert visit.response.status_code == 200
        assert visit() == "default"
    assert "CacheStore failed to load pins" in caplog.text


# Outages


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_unavailable_cache_is_logged_once(
    visit: Visit, ada: User, caplog: pytest.LogCaptureFixture
) -> None:
    with running() as server:
        url = server.connection_url
    with pins_in(redis_cache(url), PINNING_STORES=[COOKIE, CACHE], SESSION_ENGINE=SESSIONS):
        visit.browser.client.force_login(ada)
        visit(write)
        assert visit.response.status_code == 200
        assert [visit() for _ in range(3)] == ["default"] * 3
        assert len(errors(caplog)) == 1


def test_emptied_cache_loses_pins_of_other_devices_only(
    by_user: None, visit: Visit, phone: Visit, ada: User
) -> None:
    from django.core.cache import caches

    with override_settings(PINNING_STORES=[COOKIE, CACHE]):
        visit.browser.client.force_login(ada)
        phone.browser.client.force_login(ada)
        visit(write)
        caches["pins"].clear()
        assert visit() == "default"
        assert is_replica(phone())


# Keys of shared objects


@pytest.fixture
def with_keys(by_user: None) -> Iterator[None]:
    with override_settings(PINNING_STORES=[COOKIE]):
        yield


def test_followers_of_a_key_read_the_primary(with_keys: None, visit: Visit, phone: Visit) -> None:
    def change(request: Any) -> None:
        write()
        pin_keys("order:42")

    async def aread(request: Any) -> str:
        before = where()
        await afollow_keys("order:42", "order:43")
        return f"{before} {where()}"

    def read(request: Any) -> str:
        before = where()
        follow_keys("order:42", "order:43")
        return f"{before} {where()}"

    def answers() -> list[str]:
        response = send(phone, aread if phone.kind == "async" else read)
        return str(response.content.decode()).split()

    assert all(map(is_replica, answers()))
    visit(change, "post")
    before, after = answers()
    assert (is_replica(before), after) == (True, "default")
    assert is_replica(phone()), "who does not open it reads a replica"


def test_many_keys_are_pinned_at_once(with_keys: None, visit: Visit, phone: Visit) -> None:
    names = [f"order:{number}" for number in range(20)]

    def change(request: Any) -> None:
        write()
        pin_keys(*names[:10])
        pin_keys(*names[10:])

    visit(change)
    for name in names:
        assert phone(lambda request, name=name: follow_keys(name) or where()) == "default"


def test_key_is_pinned_in_one_pool(with_keys: None, visit: Visit, phone: Visit) -> None:
    with override_settings(
        PINNING_REPLICAS={"default": ["replica1", "replica2"], "users": ["users_replica"]}
    ):
        visit(lambda request: (write(), pin_keys("order:42", using="users")))
        assert set(keyed.load_pins("key", ["order:42"])) == {USERS}
        visit(lambda request: pin_keys("order:43"))
        assert set(keyed.load_pins("key", ["order:43"])) == {DEFAULT, USERS}
        with pytest.raises(ValueError, match="'nowhere' is not a primary"):
            pin_keys("x", using="nowhere")


def test_keys_of_one_scope_are_pinned_each_in_its_pool(with_keys: None, visit: Visit) -> None:
    def change(request: Any) -> None:
        pin_keys("order:44", using="users")
        pin_keys("order:45", using="default")

    with override_settings(
        PINNING_REPLICAS={"default": ["replica1", "replica2"], "users": ["users_replica"]}
    ):
        visit(change)
        assert set(keyed.load_pins("key", ["order:44"])) == {USERS}
        assert set(keyed.load_pins("key", ["order:45"])) == {DEFAULT}


def test_key_is_pinned_without_a_write(with_keys: None, visit: Visit) -> None:
    """For writes by a trigger or another system."""
    visit(lambda request: pin_keys("order:42"))
    assert set(keyed.load_pins("key", ["order:42"])) == {DEFAULT}
    assert not visit.response.cookies


def test_key_outside_a_scope_is_pinned_at_once(with_keys: None) -> None:
    write()
    pin_keys("order:42")
    assert set(keyed.load_pins("key", ["order:42"])) == {DEFAULT}


def test_key_outside_a_scope_is_pinned_on_commit(with_keys: None) -> None:
    with transaction.atomic():
        write()
        pin_keys("order:42")
        assert keyed.load_pins("key", ["order:42"]) == {}
    assert set(keyed.load_pins("key", ["order:42"])) == {DEFAULT}


def test_key_is_not_pinned_after_a_rollback(with_keys: None) -> None:
    with transaction.atomic():
        write()
        pin_keys("order:42")
        transaction.set_rollback(True)
    assert keyed.load_pins("key", ["order:42"]) == {}


def test_key_inside_a_scope_is_pinned_at_its_end(with_keys: None) -> None:
    with pinning_scope():
        with transaction.atomic():
            write()
            pin_keys("order:42")
        assert keyed.load_pins("key", ["order:42"]) == {}
    assert set(keyed.load_pins("key", ["order:42"])) == {DEFAULT}


def test_key_inside_an_async_scope_is_pinned_at_its_end(with_keys: None) -> None:
    async def work() -> None:
        async with pinning_scope():
            await Book.objects.acreate(title="x")
            pin_keys("order:42")

    async_to_sync(work)()
    assert set(keyed.load_pins("key", ["order:42"])) == {DEFAULT}


def test_following_a_key_does_not_pin_the_client(
    with_keys: None, visit: Visit, phone: Visit
) -> None:
    """Reading a followed key does not pin."""
    visit(lambda request: (write(), pin_keys("order:42")))
    phone(lambda request: follow_keys("order:42"))
    assert "pinning" not in phone.browser.cookies


def test_write_is_saved_although_a_followed_key_has_a_later_pin(
    with_keys: None, visit: Visit
) -> None:
    """Another request has pinned the key between the write and the look-up."""

    def act(request: Any) -> None:
        write()
        keyed.save_pins("key", ["order:42"], {DEFAULT: Pin(time.time() + 15.5)})
        follow_keys("order:42")

    visit(act)
    assert "pinning" in visit.browser.cookies
    assert visit() == "default"


def test_key_that_is_pinned_after_the_end_of_a_scope_is_saved() -> None:
    def late() -> None:
        Book.objects.create(title="late")
        pin_keys("order:late")

    with pinning_scope(isolated=True):
        context = contextvars.copy_context()
    assert not keyed.load_pins("key", ["order:late"])
    context.run(late)
    assert keyed.load_pins("key", ["order:late"])


def test_key_of_a_scope_inside_a_long_transaction_is_pinned_again_at_the_commit(
    clock: FrozenDateTimeFactory,
) -> None:
    with transaction.atomic():
        with pinning_scope():
            Book.objects.create(title="new")
            pin_keys("order:42")
        clock.tick(20)
    assert keyed.load_pins("key", ["order:42"])


def test_key_outside_a_scope_is_pinned_at_once_without_autocommit(with_keys: None) -> None:
    connection = connections["default"]
    connection.set_autocommit(False)
    try:
        Book.objects.create(title="new")
        pin_keys("order:42")
        (pin,) = keyed.load_pins("key", ["order:42"]).values()
        assert pin.position is None
    finally:
        connection.rollback()
        connection.set_autocommit(True)


async def ada_key(request: Any) -> str:
    return "ada"


@override_settings(
    PINNING_STORES=["pinning_middleware.stores.CacheStore"],
    PINNING_USER_KEY="tests.test_stores.ada_key",
)
def test_pin_that_an_event_loop_sets_after_its_response_is_saved(do: Callable[..., str]) -> None:
    """By an asynchronous key, and without blocking the loop."""

    async def requests() -> None:
        client, finish = AsyncClient(), asyncio.Event()
        tasks: list[asyncio.Task[None]] = []

        async def late() -> None:
            await finish.wait()
            pin_this_request()

        async def act(request: Any) -> HttpResponse:
            tasks.append(asyncio.get_running_loop().create_task(late()))
            return HttpResponse()

        async def alias() -> str:
            found: list[str] = []
            await client.get(f"/async/{do(lambda request: found.append(where()))}/")
            return found[0]

        await client.get(f"/async/{do(act)}/")
        assert is_replica(await alias())
        finish.set()
        await tasks[0]
        for _ in range(2000):
            if (found := await alias()) == "default":
                break
            await asyncio.sleep(0.01)
        assert found == "default"

    asyncio.run(requests())
