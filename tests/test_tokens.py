from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.signing import Signer
from django.test import override_settings

from pinning_middleware import tokens
from pinning_middleware.exceptions import InvalidToken
from pinning_middleware.pins import Pin
from pinning_middleware.signals import token_rejected
from pinning_middleware.stores import CookieStore
from tests.conftest import Visit, is_replica

SALT = "pinning_middleware.token"
FAR = 4_000_000_000.0
PINS = {"default": Pin(FAR, 5.0, {"1": 7}), "users": Pin(FAR)}


@pytest.fixture(autouse=True)
def nothing_rejected_yet() -> Iterator[None]:
    tokens.rejected.clear()
    yield
    tokens.rejected.clear()


def signed(content: Any) -> str:
    return Signer(salt=SALT).sign_object(content)


def signed_text(text: str) -> str:
    return Signer(salt=SALT).sign(text)


def altered(place: int) -> str:
    token = tokens.dumps(PINS)
    letter = "A" if token[place] != "A" else "B"
    return token[:place] + letter + token[place:][1:]


UNREADABLE = {
    "empty": (lambda: "", "signature"),
    "garbage": (lambda: "garbage", "signature"),
    "colons": (lambda: ":::", "signature"),
    "not ascii": (lambda: "\u00e9\U0001f600:\u00e9", "signature"),
    "not Unicode": (lambda: "garbage:\udcff", "content"),
    "null": (lambda: "\x00:\x00", "signature"),
    "other key": (lambda: Signer(key="guessed", salt=SALT).sign_object({}), "signature"),
    "other salt": (lambda: Signer(salt="other").sign_object({"default": [FAR]}), "signature"),
    "no signature": (lambda: tokens.dumps(PINS).rpartition(":")[0], "signature"),
    "cut off": (lambda: tokens.dumps(PINS)[:-1], "signature"),
    "content altered": (lambda: altered(3), "signature"),
    "signature altered": (lambda: altered(-3), "signature"),
    "oversized": (lambda: "x" * (tokens.MAX_LENGTH + 1), "oversized"),
    "oversized but ours": (lambda: signed({"a" * tokens.MAX_LENGTH: [FAR]}), "oversized"),
    "a list": (lambda: signed([]), "content"),
    "a number": (lambda: signed(5), "content"),
    "a pin that is none": (lambda: signed({"default": "soon"}), "content"),
    "endless": (lambda: signed({"default": [float("inf")]}), "content"),
    "not base64": (lambda: signed_text("%%%"), "content"),
    "not JSON": (lambda: signed_text("AAAA"), "content"),
}


@pytest.fixture(params=UNREADABLE.values(), ids=UNREADABLE.keys())
def unreadable(request: pytest.FixtureRequest) -> tuple[str, str]:
    make, reason = request.param
    return make(), reason


def test_round_trip() -> None:
    assert tokens.loads(tokens.dumps(PINS)) == PINS
    assert tokens.accept(tokens.dumps(PINS)) == PINS
    assert not tokens.rejected


def test_a_token_suits_a_cookie_and_a_header() -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:")
    assert set(tokens.dumps(PINS)) <= allowed


def test_an_unreadable_token_says_why(unreadable: tuple[str, str]) -> None:
    token, reason = unreadable
    with pytest.raises(InvalidToken) as raised:
        tokens.loads(token)
    assert raised.value.reason == reason


def test_an_unreadable_token_is_ignored_counted_and_said(
    unreadable: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    token, reason = unreadable
    heard = []

    def hear(sender: Any, reason: str, **kwargs: Any) -> None:
        heard.append((sender, reason))

    token_rejected.connect(hear)
    try:
        with caplog.at_level("INFO", "pinning_middleware"):
            assert tokens.accept(token, CookieStore) == {}
    finally:
        token_rejected.disconnect(hear)
    assert tokens.rejected == {reason: 1}
    assert heard == [(CookieStore, reason)]
    assert caplog.messages == [f"A pinning token was ignored: {reason}"]


@pytest.mark.parametrize("name", ["garbage", "other key", "oversized but ours", "a list"])
def test_a_browser_with_an_unreadable_cookie_is_served(visit: Visit, name: str) -> None:
    make, reason = UNREADABLE[name]
    visit.browser.cookies["pinning"] = make()
    assert is_replica(visit())
    assert visit.response.status_code == 200
    assert tokens.rejected == {reason: 1}


def test_an_outlived_token_is_ignored() -> None:
    past = time.time() - 1
    token = tokens.dumps({"default": Pin(past), "users": Pin(FAR)})
    assert tokens.accept(token) == {"users": Pin(FAR)}
    assert not tokens.rejected


def test_a_token_survives_the_rotation_of_the_key() -> None:
    with override_settings(SECRET_KEY="old"):
        token = tokens.dumps(PINS)
    with override_settings(SECRET_KEY="new", SECRET_KEY_FALLBACKS=["older", "old"]):
        assert tokens.accept(token) == PINS
        assert tokens.dumps(PINS) != token
    with override_settings(SECRET_KEY="new"):
        assert tokens.accept(token) == {}
    assert tokens.rejected == {"signature": 1}


def test_an_unknown_alias_in_a_token_concerns_nobody(visit: Visit) -> None:
    """A pool that a deployment has removed."""
    visit.browser.cookies["pinning"] = tokens.dumps({"removed": Pin(FAR)})
    assert is_replica(visit())
