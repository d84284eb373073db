from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.signing import Signer
from django.test import override_settings

from pinning_middleware import tokens
from pinning_middleware.exceptions import InvalidToken
from pinning_middleware.pins import POSITION_LIFETIME, Pin, PinKey, PinKind, Pins, Position
from pinning_middleware.signals import token_rejected
from pinning_middleware.stores import CookieStore
from pinning_middleware.utils.counters import pin_events, rejected_tokens
from tests.conftest import Visit, is_replica

SALT = "pinning_middleware.token"
FAR = 4_000_000_000.0
DEFAULT, USERS = PinKey("default"), PinKey("users")
PINS = {DEFAULT: Pin(FAR, 5.0, Position({"1": 7})), USERS: Pin(FAR)}


@pytest.fixture(autouse=True)
def reset_counters() -> Iterator[None]:
    rejected_tokens.clear()
    yield
    rejected_tokens.clear()


def signed(content: Any) -> str:
    return Signer(salt=SALT).sign_object(content)


def signed_text(text: str) -> str:
    return Signer(salt=SALT).sign(text)


def altered(place: int) -> str:
    token = tokens.dumps(PINS)
    letter = "A" if token[place] != "A" else "B"
    return token[:place] + letter + token[place:][1:]


INVALID = {
    "empty": (lambda: "", "signature"),
    "garbage": (lambda: "garbage", "signature"),
    "colons": (lambda: ":::", "signature"),
    "not ascii": (lambda: "\u00e9\U0001f600:\u00e9", "signature"),
    "not Unicode": (lambda: "garbage:\udcff", "content"),
    "null": (lambda: "\x00:\x00", "signature"),
    "other key": (lambda: Signer(key="guessed", salt=SALT).sign_object({}), "signature"),
    "other salt": (lambda: Signer(salt="other").sign_object({"w:default": [FAR]}), "signature"),
    "no signature": (lambda: tokens.dumps(PINS).rpartition(":")[0], "signature"),
    "cut off": (lambda: tokens.dumps(PINS)[:-1], "signature"),
    "content altered": (lambda: altered(3), "signature"),
    "signature altered": (lambda: altered(-3), "signature"),
    "oversized": (lambda: "x" * (tokens.MAX_LENGTH + 1), "oversized"),
    "oversized but ours": (lambda: signed({"w:" + "a" * tokens.MAX_LENGTH: [FAR]}), "oversized"),
    "a list": (lambda: signed([]), "content"),
    "a number": (lambda: signed(5), "content"),
    "not a pin": (lambda: signed({"w:default": "soon"}), "content"),
    "endless": (lambda: signed({"w:default": [float("inf")]}), "content"),
    "unknown kind": (lambda: signed({"x:default": [FAR]}), "content"),
    "no kind": (lambda: signed({"default": [FAR]}), "content"),
    "empty position": (lambda: signed({"w:default": [FAR, None, {}]}), "content"),
    "not base64": (lambda: signed_text("%%%"), "content"),
    "not JSON": (lambda: signed_text("AAAA"), "content"),
}


@pytest.fixture(params=INVALID.values(), ids=INVALID.keys())
def invalid(request: pytest.FixtureRequest) -> tuple[str, str]:
    make, reason = request.param
    return make(), reason


def test_loads_returns_what_dumps_was_given() -> None:
    assert tokens.loads(tokens.dumps(PINS)) == PINS
    assert tokens.accept(tokens.dumps(PINS)) == PINS
    assert not rejected_tokens


def test_token_has_characters_of_cookies_and_headers() -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:")
    assert set(tokens.dumps(PINS)) <= allowed


def test_invalid_token_raises_with_a_reason(invalid: tuple[str, str]) -> None:
    token, reason = invalid
    with pytest.raises(InvalidToken) as raised:
        tokens.loads(token)
    assert raised.value.reason == reason


def test_invalid_token_is_ignored_counted_logged_and_signalled(
    invalid: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    token, reason = invalid
    sent_signals, before = [], pin_events["rejected"]

    def hear(sender: Any, reason: str, **kwargs: Any) -> None:
        sent_signals.append((sender, reason))

    token_rejected.connect(hear)
    try:
        with caplog.at_level("INFO", "pinning_middleware"):
            assert tokens.accept(token, CookieStore) == {}
    finally:
        token_rejected.disconnect(hear)
    assert rejected_tokens == {reason: 1}
    assert pin_events["rejected"] == before + 1
    assert sent_signals == [(CookieStore, reason)]
    assert caplog.messages == [f"Ignored an invalid pinning token ({reason})."]


@pytest.mark.parametrize("name", ["garbage", "other key", "oversized but ours", "a list"])
def test_request_with_an_invalid_cookie_reads_a_replica(visit: Visit, name: str) -> None:
    make, reason = INVALID[name]
    visit.browser.cookies["pinning"] = make()
    assert is_replica(visit())
    assert visit.response.status_code == 200
    assert rejected_tokens == {reason: 1}


def test_expired_pin_of_a_token_is_ignored() -> None:
    past = time.time() - 1
    token = tokens.dumps({DEFAULT: Pin(past), USERS: Pin(FAR)})
    assert tokens.accept(token) == {USERS: Pin(FAR)}
    assert not rejected_tokens


def test_position_of_a_token_outlives_the_window() -> None:
    with override_settings(PINNING_SECONDS=15):
        end = round(time.time() - 1, 3)
        position = Position({"1": 7})
        token = tokens.dumps({DEFAULT: Pin(end, end, position)})
        assert tokens.accept(token) == {DEFAULT: Pin(end, end, position)}
        old = tokens.dumps({DEFAULT: Pin(end - POSITION_LIFETIME, None, position)})
        assert tokens.accept(old) == {}


def test_token_is_valid_after_rotation_of_the_key() -> None:
    with override_settings(SECRET_KEY="old"):
        token = tokens.dumps(PINS)
    with override_settings(SECRET_KEY="new", SECRET_KEY_FALLBACKS=["older", "old"]):
        assert tokens.accept(token) == PINS
        assert tokens.dumps(PINS) != token
    with override_settings(SECRET_KEY="new"):
        assert tokens.accept(token) == {}
    assert rejected_tokens == {"signature": 1}


def test_unknown_alias_in_a_token_is_ignored(visit: Visit) -> None:
    """A pool that a deployment has removed."""
    visit.browser.cookies["pinning"] = tokens.dumps({PinKey("removed"): Pin(FAR)})
    assert is_replica(visit())


# Tokens that are too long


def many(pools: int, kind: PinKind = PinKind.WRITTEN, logs: int = 1) -> dict[PinKey, Pin]:
    position = Position({str(log): 2**62 for log in range(logs)})
    return {PinKey(f"shard{n:03}", kind): Pin(FAR - n, None, position) for n in range(pools)}


def replicas_of(pools: int) -> dict[str, list[str]]:
    return {f"shard{n:03}": [f"replica{n:03}"] for n in range(pools)}


def test_token_without_room_for_positions_has_a_pin_for_each_pool() -> None:
    pins = many(50, logs=2)
    assert tokens.loads(tokens.dumps(pins)) == {key: Pin(pin.until) for key, pin in pins.items()}


def test_token_without_room_for_each_pool_pins_all_pools_until_the_latest_end() -> None:
    pins = many(150)
    token = tokens.dumps(pins)
    assert len(token) <= tokens.MAX_LENGTH
    with override_settings(PINNING_REPLICAS=replicas_of(150)):
        assert tokens.loads(token) == dict.fromkeys(pins, Pin(FAR))


def test_token_without_room_keeps_both_kinds_apart() -> None:
    observed = many(150, PinKind.OBSERVED)
    first, second = PinKey("shard000"), PinKey("shard001")
    with override_settings(PINNING_REPLICAS=replicas_of(2)):
        expanded = tokens.loads(tokens.dumps(observed))
        assert set(expanded) == set(list(observed)[:2])
        both = tokens.loads(tokens.dumps({**many(150), first: Pin(FAR + 5), **observed}))
    assert both == {
        first: Pin(FAR + 5),
        second: Pin(FAR + 5),
        **dict.fromkeys(list(observed)[:2], Pin(FAR)),
    }


def test_pin_of_all_pools_merges_with_that_of_a_pool() -> None:
    position = Position({"1": 7})
    pins: Pins = {PinKey(None): Pin(FAR), DEFAULT: Pin(FAR - 9, None, position)}
    with override_settings(PINNING_REPLICAS={**replicas_of(1), "default": ["replica1"]}):
        expanded = tokens.loads(tokens.dumps(pins))
    assert set(expanded) == {DEFAULT, PinKey("shard000")}
    assert expanded[DEFAULT].until == expanded[DEFAULT].primary_only_end == FAR
    assert expanded[DEFAULT].position == position


def test_unknown_pool_is_not_added_to_a_token_of_all_pools() -> None:
    token = tokens.dumps({PinKey(None): Pin(FAR)})
    assert set(tokens.loads(token)) == {DEFAULT}
