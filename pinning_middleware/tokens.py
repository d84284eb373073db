"""Pins as signed text, for a cookie, a header or a task's message."""

from __future__ import annotations

import logging
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from django.core.signals import setting_changed
from django.core.signing import BadSignature, Signer

from pinning_middleware.conf import conf
from pinning_middleware.exceptions import InvalidToken
from pinning_middleware.pins import Pin, PinKey, PinKind, Pins, live, merge_pins, pack, unpack
from pinning_middleware.signals import token_rejected
from pinning_middleware.utils import clock
from pinning_middleware.utils.counters import pin_events, rejected_tokens
from pinning_middleware.utils.logging import log_rate_limited

logger = logging.getLogger("pinning_middleware.pins")

# Maximum number of characters. Browsers accept about 4096 for a cookie with its attributes.
MAX_LENGTH = 3072


@lru_cache(maxsize=1)
def _signer() -> Signer:
    return Signer(salt="pinning_middleware.token")


def dumps(pins: Pins) -> str:
    """
    Return the signed token of these pins, in characters that a cookie and a header allow.

    If the token is too long, positions are replaced by a window from now. If it is still too
    long, it has one pin for all pools, with the latest of their ends.
    """
    token = _signed(pins)
    if len(token) <= MAX_LENGTH:
        return token
    log_rate_limited(
        logger,
        logging.WARNING,
        "too long",
        "The token of %d pools is too long. Its positions are omitted, so its pins last until the "
        "window ends. CacheStore has no such limit.",
        len(pins),
        extra={"pools": len(pins)},
    )
    pins = {key: _without_position(pin) for key, pin in pins.items()}
    token = _signed(pins)
    return token if len(token) <= MAX_LENGTH else _signed(_for_all_pools(pins))


def _without_position(pin: Pin) -> Pin:
    # A position counts beyond the window of its write, so that it is replaced by a whole window.
    return pin if pin.position is None else Pin(max(pin.until, clock.now() + conf.seconds))


def _signed(pins: Pins) -> str:
    return _signer().sign_object(pack(pins))


def _for_all_pools(pins: Pins) -> Pins:
    kinds = {key.kind for key in pins}
    ends = {k: max(pin.until for key, pin in pins.items() if key.kind is k) for k in kinds}
    return {PinKey(None, kind): Pin(ends[kind]) for kind in PinKind if kind in kinds}


def _for_each_pool(pins: Pins) -> Pins:
    """Return the pins with one for all pools replaced by one for each pool of the site."""
    shared = {key.kind: pin for key, pin in pins.items() if key.primary is None}
    if not shared:
        return pins
    own = {key: pin for key, pin in pins.items() if key.primary is not None}
    expanded = {
        PinKey(primary, kind): pin
        for kind, pin in shared.items()
        for primary in conf.pools_by_primary
    }
    return merge_pins(own, expanded)


def loads(token: str) -> Pins:
    """
    Return the pins of a token, including expired ones.

    Raise InvalidToken with a `reason` (oversized, signature or content) unless this site signed
    the token with SECRET_KEY or one of SECRET_KEY_FALLBACKS.
    """
    if len(token) > MAX_LENGTH:
        raise InvalidToken("oversized")
    return _for_each_pool(_verified(token))


@lru_cache(maxsize=2048)
def _verified(token: str) -> Pins:
    try:
        return MappingProxyType(unpack(_signer().unsign_object(token)))
    except BadSignature:
        raise InvalidToken("signature") from None
    except ValueError:
        raise InvalidToken("content") from None


def accept(token: str, source: type[Any] | None = None) -> dict[PinKey, Pin]:
    """
    Return the live pins of a token that a client sent. An invalid token is counted, logged and
    signalled, and has no pins.
    """
    try:
        return live(loads(token), clock.now(), conf.seconds)
    except InvalidToken as error:
        rejected_tokens[error.reason] += 1
        pin_events["rejected"] += 1
        log_rate_limited(
            logger,
            logging.INFO,
            error.reason,
            "Ignored an invalid pinning token (%s).",
            error.reason,
            extra={"reason": error.reason},
        )
        token_rejected.send_robust(source, reason=error.reason)
        return {}


def _clear_caches(*, setting: str, **kwargs: Any) -> None:
    if setting in ("SECRET_KEY", "SECRET_KEY_FALLBACKS"):
        _signer.cache_clear()
        _verified.cache_clear()


setting_changed.connect(_clear_caches, dispatch_uid="pinning_middleware.tokens")
