"""Parallel requests of a browser, whose cookies arrive in the order of responses."""

from __future__ import annotations

import time
from typing import Any

import pytest
from django.http import HttpResponse
from django.test import RequestFactory
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware.pins import POSITION_LIFETIME, Pin, PinKey, PinKind, Pins, Position
from pinning_middleware.stores import CacheStore, CookieStore
from pinning_middleware.stores.base import remember_loaded
from tests.app.models import Book
from tests.conftest import Visit

DEFAULT, OBSERVED = PinKey("default"), PinKey("default", PinKind.OBSERVED)


class Jar:
    """The cookies of a browser, with the requests in flight."""

    def __init__(self) -> None:
        self.cookies: dict[str, str] = {}

    def send(self) -> Any:
        request = RequestFactory().get("/")
        request.COOKIES = dict(self.cookies)
        CookieStore().load(request)
        return request

    def take(self, request: Any, pins: Pins) -> None:
        response = HttpResponse()
        CookieStore().save(request, response, pins)
        for name, morsel in response.cookies.items():
            if morsel.value:
                self.cookies[name] = morsel.value
            else:
                self.cookies.pop(name, None)

    @property
    def pins(self) -> Pins:
        return CookieStore().load(self.send())


def pin(point: int) -> Pin:
    return Pin(round(time.time() + 15, 3), None, Position({"log": point}))


def test_older_read_does_not_remove_a_newer_write() -> None:
    """It sets nothing at all."""
    jar = Jar()
    jar.take(jar.send(), {DEFAULT: pin(1)})
    reading, writing = jar.send(), jar.send()
    newer = pin(2)
    jar.take(writing, {DEFAULT: newer})
    # The outgoing pins of a read equal the inherited ones, so no store saves.
    jar.take(reading, CookieStore().load(reading))
    assert jar.pins == {DEFAULT: newer}


@pytest.mark.usefixtures("settings")
def test_observed_position_never_overwrites_a_write(settings: Any) -> None:
    settings.PINNING_CONSISTENCY = "monotonic-reads"
    jar = Jar()
    jar.take(jar.send(), {DEFAULT: pin(1)})
    reading, writing = jar.send(), jar.send()
    newer = pin(2)
    jar.take(writing, {DEFAULT: newer})
    seen = pin(1)
    jar.take(reading, {**CookieStore().load(reading), OBSERVED: seen})
    assert jar.pins == {DEFAULT: newer, OBSERVED: seen}
    assert set(jar.cookies) == {"pinning", "pinning-seen"}


def test_read_during_the_end_of_the_window_does_not_remove_a_newer_write(
    settings: Any, clock: FrozenDateTimeFactory
) -> None:
    settings.PINNING_CONSISTENCY = "monotonic-reads"
    jar = Jar()
    jar.take(jar.send(), {DEFAULT: Pin(time.time() + 15)})
    clock.tick(14)
    reading, writing = jar.send(), jar.send()
    clock.tick(2)
    newer, seen = pin(2), pin(1)
    jar.take(writing, {DEFAULT: newer})
    jar.take(reading, {OBSERVED: seen})
    assert jar.pins == {DEFAULT: newer, OBSERVED: seen}


def test_read_after_the_window_keeps_the_position(clock: FrozenDateTimeFactory) -> None:
    """The position counts until a replica has reached it."""
    jar = Jar()
    written = pin(1)
    jar.take(jar.send(), {DEFAULT: written})
    clock.tick(60)
    jar.take(jar.send(), CookieStore().load(jar.send()))
    assert jar.pins == {DEFAULT: written}
    clock.tick(POSITION_LIFETIME)
    assert jar.pins == {}


def test_cookie_is_kept_for_the_window() -> None:
    response = HttpResponse()
    CookieStore().save(Jar().send(), response, {DEFAULT: pin(1)})
    assert 14 <= int(response.cookies["pinning"]["max-age"]) <= 16


def test_pin_whose_window_has_ended_sets_no_cookie(clock: FrozenDateTimeFactory) -> None:
    response, written = HttpResponse(), pin(1)
    clock.tick(60)
    CookieStore().save(Jar().send(), response, {DEFAULT: written})
    assert not response.cookies


def test_pin_loaded_from_another_store_does_not_set_the_cookie(settings: Any) -> None:
    """Another device of the user wrote; the pin is loaded from the cache."""
    settings.PINNING_CONSISTENCY = "monotonic-reads"
    jar = Jar()
    reading, writing = jar.send(), jar.send()
    elsewhere, newer, seen = pin(1), pin(2), pin(1)
    remember_loaded(reading, CacheStore(), {DEFAULT: elsewhere})
    jar.take(writing, {DEFAULT: newer})
    jar.take(reading, {DEFAULT: elsewhere, OBSERVED: seen})
    assert jar.pins == {DEFAULT: newer, OBSERVED: seen}


def test_responses_of_parallel_writes_out_of_order() -> None:
    """Responses of two parallel writes arrive out of order; `CacheStore` avoids this race."""
    jar = Jar()
    first, second = jar.send(), jar.send()
    jar.take(second, {DEFAULT: pin(2)})
    jar.take(first, {DEFAULT: pin(1)})
    assert jar.pins[DEFAULT].position == Position({"log": 1})


@pytest.mark.django_db(transaction=True, databases="__all__")
def test_read_sets_no_cookie(visit: Visit) -> None:
    visit(lambda request: Book.objects.create(title="x"))
    assert visit.response.cookies
    for _ in range(3):
        assert visit() == "default"
        assert not visit.response.cookies
        assert not visit.response.has_header("Vary") or "Cookie" not in visit.response["Vary"]


@pytest.mark.parametrize("name", ["pinning.js", "pinning-foo", "pinning_"])
def test_other_cookies_with_a_similar_name_are_unchanged(name: str) -> None:
    jar = Jar()
    jar.cookies[name] = "theirs"
    assert jar.pins == {}
    jar.take(jar.send(), {DEFAULT: pin(1)})
    jar.take(jar.send(), {})
    assert jar.cookies == {name: "theirs"}
