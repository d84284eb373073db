"""Tokens of an attacker: no exception, no pin that was not issued, none that lasts longer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.signing import Signer, b64_encode
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory, override_settings
from hypothesis import given
from hypothesis import strategies as st

from pinning_middleware import handoff, is_pinned, pinning_scope, tokens
from pinning_middleware.exceptions import InvalidToken
from pinning_middleware.middleware import PinningMiddleware
from pinning_middleware.pins import POSITION_LIFETIME, Pin, PinKey, PinKind, Pins, Position
from pinning_middleware.utils import clock
from tests.app.models import Book
from tests.conftest import Browser, is_replica, where
from tests.strategies import KEYS, pins

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

NOW, WINDOW = 2_000_000_000.0, 15.0
SALT = "pinning_middleware.token"
COOKIE = "pinning_middleware.stores.CookieStore"
HEADER = "pinning_middleware.stores.HeaderStore"
ISSUED = st.dictionaries(
    KEYS, pins(times=st.integers(-5, 15).map(lambda seconds: NOW + seconds)), min_size=1
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


REAL: list[Pins] = [
    {PinKey("default"): Pin(NOW + 15)},
    {PinKey("default"): Pin(NOW + 9, None, Position({"ff-1": 2**60}))},
    {PinKey("default"): Pin(NOW + 9, NOW + 5, Position({"0-1": 7, "5-1": 2}, frozenset({"5-1"})))},
    {PinKey("users"): Pin(NOW + 5), PinKey("users", PinKind.OBSERVED): Pin(NOW + 1)},
    {PinKey(None): Pin(NOW + 15)},
]


def spliced(first: str, second: str, place: int, end: int) -> list[str]:
    """Return what can be made of two tokens, without the key."""
    place, end = min(place, len(first) - 1), max(end, 1)
    (content, _, signature), (other, _, other_signature) = (
        token.rpartition(":") for token in (first, second)
    )
    return [
        first[:place],
        first[end:],
        first + first[place:],
        first[:place] + second[end:],
        f"{content}:{other_signature}",
        f"{other}:{signature}",
        f"{b64_encode(json.dumps({'w:default': [NOW + place]}).encode()).decode()}:{signature}",
        Signer(key="guessed", salt=SALT).sign(content),
        Signer(salt="other").sign(content),
        Signer().sign(content),
        "x" * (tokens.MAX_LENGTH + place),
    ]


@st.composite
def forged(draw: st.DrawFn) -> str:
    """Text that this site did not issue, most of it close to a token that it did."""
    first, second = (tokens.dumps(draw(st.sampled_from(REAL))) for _ in range(2))
    place, end = draw(st.integers(0, len(first))), draw(st.integers(0, len(first)))
    match draw(st.integers(0, 3)):
        case 0:
            token = draw(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
        case 1:
            token = first[:place] + draw(st.text(max_size=3)) + first[end:]
        case _:
            token = draw(st.sampled_from(spliced(first, second, place, end)))
    return "" if token in (first, second) else token


def signed(content: Any) -> str:
    return Signer(salt=SALT).sign(b64_encode(json.dumps(content).encode()).decode())


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Return a function that sets the clock; it stands still."""

    def move(seconds: float) -> None:
        monkeypatch.setattr(clock, "now", lambda: seconds)

    move(NOW)
    return move


@pytest.fixture
def both_stores() -> Iterator[None]:
    with override_settings(PINNING_STORES=[COOKIE, HEADER]):
        yield


# What comes in


@given(forged())
def test_forged_token_has_no_pins(at: Any, token: str) -> None:
    with pytest.raises(InvalidToken):
        tokens.loads(token)
    assert tokens.accept(token) == {}


@given(forged())
def test_scope_of_a_forged_token_has_no_pins(at: Any, token: str) -> None:
    with pinning_scope(token, isolated=True) as scope:
        assert not is_pinned()
        assert is_replica(where())
    assert scope.pins == {}
    assert scope.token is None


@given(st.lists(forged() | JSON | st.binary()))
def test_task_headers_that_are_no_tokens_have_no_pins(at: Any, received: list[Any]) -> None:
    assert handoff.pins_of_tokens(*received) == {}


@given(forged(), forged())
def test_request_with_forged_tokens_reads_a_replica_and_sets_no_cookie(
    at: Any, both_stores: None, browser: Browser, do: Callable[..., str], one: str, other: str
) -> None:
    address = f"/sync/{do(lambda request: where())}/"
    # Servers pass the bytes of a header on as latin-1.
    cookie, header = (
        text.encode(errors="surrogatepass").decode("latin-1").translate(dict.fromkeys(b"\r\n"))
        for text in (one, other)
    )
    response = browser.get(
        address, headers={"Cookie": f"pinning={cookie}", "Pinning-Token": header}
    )
    assert response.status_code == 200
    assert is_replica(response.content.decode())
    assert not response.cookies
    assert not response.headers.get("Pinning-Token")


@given(JSON | st.dictionaries(st.sampled_from(["w:default", "o:default", "w"]), st.lists(JSON)))
def test_signed_content_of_any_form_is_loaded_or_rejected(at: Any, content: Any) -> None:
    """As an older or a newer version of the package may have signed it."""
    for pin in tokens.accept(signed(content)).values():
        assert isinstance(pin, Pin)
        pin.merge(Pin(NOW)).is_live(NOW, WINDOW)
        pin.is_primary_only(NOW)


# What an issued token is worth


@given(ISSUED, st.floats(0, 2 * POSITION_LIFETIME))
def test_issued_token_has_its_own_pins_until_they_end(at: Any, issued: Pins, later: float) -> None:
    token = tokens.dumps(issued)
    at(NOW + later)
    accepted = tokens.accept(token)
    assert accepted.items() <= issued.items()
    for key, pin in issued.items():
        lifetime = 0.0 if pin.position is None else POSITION_LIFETIME - WINDOW
        assert (key in accepted) == (NOW + later < max(pin.until, pin.until + lifetime))


def ends(pins: Pins) -> list[float]:
    return [end for pin in pins.values() for end in (pin.until, pin.primary_only_until or 0)]


@given(ISSUED, st.lists(st.tuples(st.integers(0, 10), st.booleans()), max_size=5))
def test_replayed_tokens_gain_no_time(
    at: Any, both_stores: None, issued: Pins, steps: list[tuple[int, bool]]
) -> None:
    """A client presents old tokens again and again, in both places, and what it got for them."""
    now, latest, held = NOW, max(ends(issued)), [tokens.dumps(issued)]

    def view(request: HttpRequest) -> HttpResponse:
        if writes:
            Book.objects.create(title="x")
        return HttpResponse(where())

    for number, (step, writes) in enumerate(steps):
        now += step
        at(now)
        latest = max(latest, now + WINDOW) if writes else latest
        request = RequestFactory().get("/", headers={"Pinning-Token": held[-1]})
        request.COOKIES = {"pinning": held[number % len(held)], "pinning-seen": held[0]}
        response = PinningMiddleware(view)(request)
        received = response.headers.get("Pinning-Token"), *response.cookies.values()
        for token in filter(None, [getattr(one, "value", one) for one in received]):
            held.append(token)
            assert max(ends(tokens.loads(token))) <= latest
        for cookie in response.cookies.values():
            assert int(cookie["max-age"]) <= latest - now + 1


# What goes out

SHARDS = [f"shard{number:03}" for number in range(200)]
LARGE = st.builds(
    lambda names, kind, until, logs, offset: {
        PinKey(name, kind): Pin(until, None, Position(dict.fromkeys(logs, offset)))
        for name in names
    },
    st.integers(0, len(SHARDS)).map(lambda number: SHARDS[:number]),
    st.sampled_from(PinKind),
    st.floats(NOW - 10, NOW + WINDOW),
    st.lists(st.text(max_size=50), min_size=1, max_size=5),
    st.integers(0, 2**64),
)


@given(LARGE, LARGE)
def test_token_of_any_pins_is_bounded_and_shortens_none(at: Any, one: Pins, other: Pins) -> None:
    pins = {**one, **other}
    with override_settings(PINNING_REPLICAS={name: [f"{name}-replica"] for name in SHARDS}):
        token = tokens.dumps(pins)
        loaded = tokens.loads(token)
    assert len(token) <= tokens.MAX_LENGTH
    for key, pin in pins.items():
        assert loaded[key].until >= pin.until - 0.001
        assert loaded[key].position == pin.position or loaded[key].is_primary_only(
            NOW + WINDOW - 0.001
        )
