"""A browser sends requests in parallel, and takes cookies in the order of the responses."""

from __future__ import annotations

import time
from http.cookies import SimpleCookie

import pytest
from django.http import HttpRequest, HttpResponse

from pinning_middleware.pins import Pin
from pinning_middleware.stores import MOST_COOKIES, CookieStore

STORE = CookieStore()


class Jar(dict[str, str]):
    """A browser's cookies."""

    def request(self) -> HttpRequest:
        request = HttpRequest()
        request.COOKIES = dict(self)
        return request

    def take(self, cookies: SimpleCookie) -> None:
        for name, morsel in cookies.items():
            if morsel["max-age"] == 0:
                self.pop(name, None)
            else:
                self[name] = morsel.value

    def answered(self, request: HttpRequest, pins: dict[str, Pin]) -> None:
        response = HttpResponse()
        STORE.save(request, response, pins)
        self.take(response.cookies)

    @property
    def point(self) -> int:
        pin = STORE.load(self.request()).get("default")
        return (pin.position or {}).get("log", 0) if pin else 0


def at(point: int) -> dict[str, Pin]:
    return {"default": Pin(time.time() + 15, 0.0, {"log": point})}


@pytest.fixture
def jar() -> Jar:
    """The cookies of somebody who has written once."""
    jar = Jar()
    jar.answered(jar.request(), at(1))
    assert jar.point == 1
    return jar


def test_an_older_read_that_ends_the_pin_leaves_a_newer_write_pinned(jar: Jar) -> None:
    read, write = jar.request(), jar.request()
    jar.answered(write, at(2))
    jar.answered(read, {})
    assert jar.point == 2


def test_also_after_several_writes(jar: Jar) -> None:
    jar.answered(jar.request(), at(2))
    read, write = jar.request(), jar.request()
    jar.answered(write, at(3))
    jar.answered(read, {})
    assert jar.point == 3


def test_an_older_write_leaves_a_newer_write_pinned(jar: Jar) -> None:
    older, newer = jar.request(), jar.request()
    jar.answered(newer, at(3))
    jar.answered(older, at(2))
    assert jar.point == 3


def test_a_read_that_brings_every_cookie_ends_them_all(jar: Jar) -> None:
    for point in range(2, 6):
        jar.answered(jar.request(), at(point))
    jar.answered(jar.request(), {})
    assert jar == {}


def test_writes_one_after_the_other_leave_one_spare(jar: Jar) -> None:
    for point in range(2, 20):
        jar.answered(jar.request(), at(point))
    assert len(jar) == 2


def test_no_more_cookies_are_read_than_may_be_there(jar: Jar) -> None:
    for number in range(100):
        jar[f"pinning.{number}"] = jar["pinning"]
    assert len(STORE.read(jar.request())) == MOST_COOKIES
