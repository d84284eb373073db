"""For those who write a store: what every store keeps to, as tests to be inherited."""

from __future__ import annotations

import time
from http.cookies import SimpleCookie
from typing import ClassVar

from asgiref.sync import async_to_sync
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory, override_settings

from pinning_middleware.pins import SEEN, Pin, Pins, merge_pins
from pinning_middleware.stores import BaseStore

__all__ = ["StoreContract"]

# A second is no part of what a store promises; the fraction that it may round away is.
_ROUNDING = 0.002


class StoreContract:
    """
    Inherit it, beside ``TestCase`` where the store needs a database, and say which store::

        class TestSessionStore(StoreContract, TestCase):
            store = SessionStore()

    Override ``new_request`` for a store that needs more than cookies, ``next_request`` where a
    client hands back something else.
    """

    store: ClassVar[BaseStore]
    # Whether clients share what the store keeps, as a user's browsers do, so that it has to merge
    # and has no need of a response.
    shared: ClassVar[bool] = False

    def new_request(self) -> HttpRequest:
        """Return the first request of a client."""
        return RequestFactory().get("/")

    def next_request(self, request: HttpRequest, response: HttpResponse) -> HttpRequest:
        """Return what the client sends after this response."""
        following = self.new_request()
        following.COOKIES = {**request.COOKIES, **_values(response.cookies)}
        if hasattr(request, "user"):
            following.user = request.user
        if hasattr(request, "session"):
            # Opened anew: only what was saved is there.
            following.session = type(request.session)(request.session.session_key)
        return following

    # Steps of a test

    def load(self, request: HttpRequest) -> Pins:
        return self.store.load(request)

    def save(self, request: HttpRequest, pins: Pins) -> HttpRequest:
        """Save these pins and return the client's next request."""
        response = HttpResponse()
        self.store.save(request, response, pins)
        return self.next_request(request, response)

    def after(self, pins: Pins) -> HttpRequest:
        """Return the request of a client that was given these pins by an earlier one."""
        request = self.new_request()
        self.load(request)
        return self.save(request, pins)

    # The contract

    def test_a_new_client_has_no_pins(self) -> None:
        assert dict(self.load(self.new_request())) == {}

    def test_the_async_twin_finds_none_either(self) -> None:
        assert dict(async_to_sync(self.store.aload)(self.new_request())) == {}

    def test_pins_come_back(self) -> None:
        pins = _pins()
        assert_same(self.load(self.after(pins)), pins)

    def test_pins_come_back_more_than_once(self) -> None:
        """Whether a pin is over is for its window to say, not for how often it was read."""
        pins = _pins()
        request = self.after(pins)
        assert_same(self.load(request), pins)
        assert_same(self.load(self.next_request(request, HttpResponse())), pins)

    def test_what_has_been_seen_comes_back_beside_what_was_written(self) -> None:
        """So it is saved under ``monotonic-reads``."""
        old, seen = _pins(), {SEEN + "default": Pin(time.time() + 15, 0.0, {"1": 2**61})}
        with override_settings(PINNING_CONSISTENCY="monotonic-reads"):
            request = self.after(old)
            following = self.save(request, {**self.load(request), **seen})
            assert_same(self.load(following), {**old, **seen})

    def test_pins_come_back_in_async_code(self) -> None:
        pins = _pins()

        async def visit() -> Pins:
            request, response = self.new_request(), HttpResponse()
            await self.store.aload(request)
            await self.store.asave(request, response, pins)
            return await self.store.aload(self.next_request(request, response))

        assert_same(async_to_sync(visit)(), pins)

    def test_what_is_saved_is_not_changed(self) -> None:
        pins = _pins()
        copy = dict(pins)
        self.after(pins)
        assert pins == copy

    def test_merging_shortens_nothing(self) -> None:
        """The middleware saves what it loaded, merged with what the request did."""
        old = _pins()
        request = self.after(old)
        new = {"default": Pin(time.time() + 3, 0.0, {"1": 90, "2": 90})}
        following = self.save(request, merge_pins(self.load(request), new))
        assert_same(self.load(following), merge_pins(old, new))

    def test_parallel_requests_shorten_nothing(self) -> None:
        if not self.shared:
            return
        old, new = _pins(), {"default": Pin(time.time() + 3, 0.0, {"1": 90, "2": 90})}
        first, second = self.new_request(), self.new_request()
        self.load(first)
        self.load(second)
        self.save(first, old)
        self.save(second, new)
        assert_same(self.load(self.new_request()), merge_pins(old, new))

    def test_what_a_request_did_not_come_with_is_not_forgotten(self) -> None:
        if not self.shared:
            return
        older, pins = self.new_request(), _pins()
        self.load(older)
        self.save(self.new_request(), pins)
        self.save(older, {})
        assert_same(self.load(self.new_request()), pins)

    def test_no_pins_forget_those_that_were_kept(self) -> None:
        request = self.after(_pins())
        self.load(request)
        assert dict(self.load(self.save(request, {}))) == {}

    def test_one_pool_may_be_forgotten(self) -> None:
        pins = _pins()
        request = self.after(pins)
        kept = {alias: pin for alias, pin in self.load(request).items() if alias == "users"}
        assert_same(self.load(self.save(request, kept)), {"users": pins["users"]})

    def test_forgetting_nothing_is_no_error(self) -> None:
        assert dict(self.load(self.after({}))) == {}

    def test_a_response_that_is_out_is_no_error(self) -> None:
        """So it is for a streaming body, and where the view raised."""
        pins, request = _pins(), self.new_request()
        self.load(request)
        self.store.save(request, None, pins)
        async_to_sync(self.store.asave)(request, None, pins)
        if self.shared:
            assert_same(self.load(self.new_request()), pins)


def assert_same(found: Pins, expected: Pins) -> None:
    """Assert that these are the same pins, but for fractions of a second."""
    assert set(found) == set(expected)
    for alias, pin in expected.items():
        assert found[alias].position == pin.position
        assert abs(found[alias].until - pin.until) < _ROUNDING
        assert abs(found[alias].held_until - pin.held_until) < _ROUNDING


def _pins() -> dict[str, Pin]:
    """Return a pin that a position may end, and one that only time does."""
    until = time.time() + 15
    return {"default": Pin(until, 0.0, {"1": 2**60, "2": 7}), "users": Pin(until + 15, until + 15)}


def _values(cookies: SimpleCookie) -> dict[str, str]:
    return {name: morsel.value for name, morsel in cookies.items()}
