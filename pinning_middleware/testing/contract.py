"""The contract of stores, as test methods to inherit."""

from __future__ import annotations

import time
from http.cookies import SimpleCookie
from typing import ClassVar

from asgiref.sync import async_to_sync
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory, override_settings

from pinning_middleware.pins import Pin, PinKey, PinKind, Pins, Position, merge_pins
from pinning_middleware.stores import BaseStore

# Stores may round times to milliseconds (seconds).
_ROUNDING = 0.002


class StoreContract:
    """
    A mixin of test methods that every store should pass.

    Add ``TestCase`` if the store needs a database::

        class TestSessionStore(StoreContract, TestCase):
            store = SessionStore()

    Override ``new_request`` if the store needs more than cookies, and ``next_request`` if clients
    return something other than cookies.
    """

    store: ClassVar[BaseStore]
    # Whether clients share the stored pins, like the browsers of one user. Such a store must merge
    # pins and must not need a response.
    shared: ClassVar[bool] = False

    def new_request(self) -> HttpRequest:
        """Return the first request of a new client."""
        return RequestFactory().get("/")

    def next_request(self, request: HttpRequest, response: HttpResponse) -> HttpRequest:
        """Return the request that the client sends after this response."""
        following = self.new_request()
        following.COOKIES = {**request.COOKIES, **_values(response.cookies)}
        if hasattr(request, "user"):
            following.user = request.user
        if hasattr(request, "session"):
            # A new session object, so that only saved data is loaded.
            following.session = type(request.session)(request.session.session_key)
        return following

    # Helpers

    def load(self, request: HttpRequest) -> Pins:
        return self.store.load(request)

    def save(self, request: HttpRequest, pins: Pins) -> HttpRequest:
        """Save pins and return the next request of the client."""
        response = HttpResponse()
        self.store.save(request, response, pins)
        return self.next_request(request, response)

    def after(self, pins: Pins) -> HttpRequest:
        """Save pins for a new client and return its next request."""
        request = self.new_request()
        self.load(request)
        return self.save(request, pins)

    # The contract

    def test_load_new_client_has_no_pins(self) -> None:
        assert dict(self.load(self.new_request())) == {}

    def test_aload_new_client_has_no_pins(self) -> None:
        assert dict(async_to_sync(self.store.aload)(self.new_request())) == {}

    def test_load_returns_saved_pins(self) -> None:
        pins = _pins()
        assert_same(self.load(self.after(pins)), pins)

    def test_load_is_repeatable(self) -> None:
        """Loading a pin does not consume it."""
        pins = _pins()
        request = self.after(pins)
        assert_same(self.load(request), pins)
        assert_same(self.load(self.next_request(request, HttpResponse())), pins)

    def test_load_returns_observed_and_written_pins(self) -> None:
        """Both kinds are saved under ``monotonic-reads``."""
        old, seen = (
            _pins(),
            {
                PinKey("default", PinKind.OBSERVED): Pin(
                    time.time() + 15, None, Position({"1": 2**61})
                )
            },
        )
        with override_settings(PINNING_CONSISTENCY="monotonic-reads"):
            request = self.after(old)
            following = self.save(request, {**self.load(request), **seen})
            assert_same(self.load(following), {**old, **seen})

    def test_aload_returns_asaved_pins(self) -> None:
        pins = _pins()

        async def visit() -> Pins:
            request, response = self.new_request(), HttpResponse()
            await self.store.aload(request)
            await self.store.asave(request, response, pins)
            return await self.store.aload(self.next_request(request, response))

        assert_same(async_to_sync(visit)(), pins)

    def test_save_does_not_modify_its_argument(self) -> None:
        pins = _pins()
        copy = dict(pins)
        self.after(pins)
        assert pins == copy

    def test_save_of_merged_pins_shortens_none(self) -> None:
        """The middleware saves the loaded pins merged with those of the request."""
        old = _pins()
        request = self.after(old)
        new = {PinKey("default"): Pin(time.time() + 3, None, Position({"1": 90, "2": 90}))}
        following = self.save(request, merge_pins(self.load(request), new))
        assert_same(self.load(following), merge_pins(old, new))

    def test_save_by_parallel_requests_shortens_no_pin(self) -> None:
        if not self.shared:
            return
        old, new = (
            _pins(),
            {PinKey("default"): Pin(time.time() + 3, None, Position({"1": 90, "2": 90}))},
        )
        first, second = self.new_request(), self.new_request()
        self.load(first)
        self.load(second)
        self.save(first, old)
        self.save(second, new)
        assert_same(self.load(self.new_request()), merge_pins(old, new))

    def test_save_keeps_pins_that_were_not_loaded(self) -> None:
        if not self.shared:
            return
        older, pins = self.new_request(), _pins()
        self.load(older)
        self.save(self.new_request(), pins)
        self.save(older, {})
        assert_same(self.load(self.new_request()), pins)

    def test_save_of_no_pins_removes_loaded_pins(self) -> None:
        request = self.after(_pins())
        self.load(request)
        assert dict(self.load(self.save(request, {}))) == {}

    def test_save_without_one_pool_removes_its_pin(self) -> None:
        pins = _pins()
        request = self.after(pins)
        kept = {key: pin for key, pin in self.load(request).items() if key.primary == "users"}
        assert_same(self.load(self.save(request, kept)), {PinKey("users"): pins[PinKey("users")]})

    def test_save_of_no_pins_without_loaded_pins(self) -> None:
        assert dict(self.load(self.after({}))) == {}

    def test_save_without_response(self) -> None:
        """The response is None for a streaming body, and if the view raised."""
        pins, request = _pins(), self.new_request()
        self.load(request)
        self.store.save(request, None, pins)
        async_to_sync(self.store.asave)(request, None, pins)
        if self.shared:
            assert_same(self.load(self.new_request()), pins)


def assert_same(found: Pins, expected: Pins) -> None:
    """Assert that pins are equal, up to rounding."""
    assert set(found) == set(expected)
    for key, pin in expected.items():
        assert found[key].position == pin.position
        assert abs(found[key].until - pin.until) < _ROUNDING
        ends = found[key].primary_only_end, pin.primary_only_end
        assert abs(max(0.0, ends[0]) - max(0.0, ends[1])) < _ROUNDING


def _pins() -> dict[PinKey, Pin]:
    """Return a pin with a position and one without."""
    until = time.time() + 15
    return {
        PinKey("default"): Pin(until, None, Position({"1": 2**60, "2": 7})),
        PinKey("users"): Pin(until + 15),
    }


def _values(cookies: SimpleCookie) -> dict[str, str]:
    return {name: morsel.value for name, morsel in cookies.items()}
