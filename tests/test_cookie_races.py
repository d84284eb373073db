"""A browser sends requests in parallel, and takes cookies in the order of the responses."""

from __future__ import annotations

import time
from typing import Any

import pytest
from django.http import HttpResponse
from django.test import RequestFactory
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware.pins import Pin, Pins
from pinning_middleware.stores import CacheStore, CookieStore
from pinning_middleware.stores.base import remember
from tests.app.models import Book
from tests.conftest import Visit


class Jar:
    """A browser's cookies, and what it sends and takes."""

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
    return Pin(round(time.time() + 15, 3), 0.0, {"log": point})


def test_an_older_read_takes_no_newer_write_away() -> None:
    """It sets nothing at all."""
    jar = Jar()
    jar.take(jar.send(), {"default": pin(1)})
    reading, writing = jar.send(), jar.send()
    newer = pin(2)
    jar.take(writing, {"default": newer})
    # What a read leaves behind is what it came with, so that no store is asked to save.
    jar.take(reading, CookieStore().load(reading))
    assert jar.pins == {"default": newer}


@pytest.mark.usefixtures("settings")
def test_what_was_seen_never_overwrites_a_write(settings: Any) -> None:
    settings.PINNING_CONSISTENCY = "monotonic-reads"
    jar = Jar()
    jar.take(jar.send(), {"default": pin(1)})
    reading, writing = jar.send(), jar.send()
    newer = pin(2)
    jar.take(writing, {"default": newer})
    seen = pin(1)
    jar.take(reading, {**CookieStore().load(reading), "~default": seen})
    assert jar.pins == {"default": newer, "~default": seen}
    assert set(jar.cookies) == {"pinning", "pinning-seen"}


def test_a_read_during_which_the_pin_ends_takes_no_newer_write_away(
    settings: Any, clock: FrozenDateTimeFactory
) -> None:
    settings.PINNING_CONSISTENCY = "monotonic-reads"
    jar = Jar()
    jar.take(jar.send(), {"default": pin(1)})
    clock.tick(14)
    reading, writing = jar.send(), jar.send()
    clock.tick(2)
    newer, seen = pin(2), pin(1)
    jar.take(writing, {"default": newer})
    jar.take(reading, {"~default": seen})
    assert jar.pins == {"default": newer, "~default": seen}


def test_what_another_store_brought_is_no_write_of_this_request(settings: Any) -> None:
    """A read of a user whose other device wrote: it has that from the cache."""
    settings.PINNING_CONSISTENCY = "monotonic-reads"
    jar = Jar()
    reading, writing = jar.send(), jar.send()
    elsewhere, newer, seen = pin(1), pin(2), pin(1)
    remember(reading, CacheStore(), {"default": elsewhere})
    jar.take(writing, {"default": newer})
    jar.take(reading, {"default": elsewhere, "~default": seen})
    assert jar.pins == {"default": newer, "~default": seen}


def test_the_race_that_is_left() -> None:
    """Two writes in parallel whose responses change places: `CacheStore` closes it."""
    jar = Jar()
    first, second = jar.send(), jar.send()
    jar.take(second, {"default": pin(2)})
    jar.take(first, {"default": pin(1)})
    assert jar.pins["default"].position == {"log": 1}


@pytest.mark.django_db(transaction=True, databases="__all__")
def test_a_read_sets_no_cookie(visit: Visit) -> None:
    visit(lambda request: Book.objects.create(title="x"))
    assert visit.response.cookies
    for _ in range(3):
        assert visit() == "default"
        assert not visit.response.cookies
        assert not visit.response.has_header("Vary") or "Cookie" not in visit.response["Vary"]


@pytest.mark.parametrize("name", ["pinning.js", "pinning-foo", "pinning_"])
def test_foreign_cookies_of_a_like_name_are_left_alone(name: str) -> None:
    jar = Jar()
    jar.cookies[name] = "theirs"
    assert jar.pins == {}
    jar.take(jar.send(), {"default": pin(1)})
    jar.take(jar.send(), {})
    assert jar.cookies == {name: "theirs"}
