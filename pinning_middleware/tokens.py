"""Pins as signed text: what a browser, an API client or a task's message may carry."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from django.core.signals import setting_changed
from django.core.signing import BadSignature, Signer, b64_decode, b64_encode

from pinning_middleware.exceptions import InvalidToken
from pinning_middleware.pins import Pin, Pins, live, pack, unpack
from pinning_middleware.signals import token_rejected
from pinning_middleware.utils import clock
from pinning_middleware.utils.counters import pins as counted
from pinning_middleware.utils.counters import rejected
from pinning_middleware.utils.logging import log_rate_limited

__all__ = ["MAX_LENGTH", "accept", "dumps", "loads", "rejected"]

logger = logging.getLogger("pinning_middleware.pins")

# Less than a browser lets a cookie have, its name and attributes included.
MAX_LENGTH = 3072
# So many tokens that were made or verified here need not be verified again, and as many before.
REMEMBERED = 1024
_known: dict[str, Pins] = {}
_known_before: dict[str, Pins] = {}


# What `Signer.sign_object` does, with an encoder that is made once.
_encode = json.JSONEncoder(separators=(",", ":")).encode


@lru_cache(maxsize=1)
def _signer() -> Signer:
    return Signer(salt="pinning_middleware.token")


def dumps(pins: Pins) -> str:
    """
    Return the signed token of these pins, of the letters a cookie and a header may have. Where
    there is no room for all positions, the window serves.

    ``ValueError`` where there is no room for the pins either.
    """
    token = _signed(pins)
    if len(token) > MAX_LENGTH:
        log_rate_limited(
            logger,
            logging.WARNING,
            "too long",
            "A token of %d pools is too long: its positions are left out.",
            len(pins),
            extra={"pools": len(pins)},
        )
        token = _signed({alias: Pin(pin.until) for alias, pin in pins.items()})
    if len(token) <= MAX_LENGTH:
        return token
    raise ValueError(f"the pins of {len(pins)} pools do not fit into {MAX_LENGTH} letters")


def _signed(pins: Pins) -> str:
    packed = pack(pins)
    token = _signer().sign(b64_encode(_encode(packed).encode()).decode())
    # Most come back to the process that made them.
    _remember(token, {alias: Pin(*row) for alias, row in packed.items()})
    return token


def loads(token: str) -> Pins:
    """
    Return the pins of a token, also those whose window has ended.

    Raises ``InvalidToken`` (``reason``: oversized, signature or content) for what this site did
    not sign with ``SECRET_KEY`` or one of ``SECRET_KEY_FALLBACKS``.
    """
    if len(token) > MAX_LENGTH:
        raise InvalidToken("oversized")
    pins = _known.get(token)
    if pins is None:
        pins = _known_before.get(token)
    if pins is not None:
        return pins
    try:
        found = unpack(json.loads(b64_decode(_signer().unsign(token).encode())))
    except BadSignature:
        raise InvalidToken("signature") from None
    except ValueError:
        raise InvalidToken("content") from None
    return _remember(token, found)


def _remember(token: str, pins: dict[str, Pin]) -> Pins:
    global _known, _known_before
    if len(_known) >= REMEMBERED:
        _known_before, _known = _known, {}
    known = _known[token] = MappingProxyType(pins)
    return known


def accept(token: str, source: type[Any] | None = None) -> dict[str, Pin]:
    """
    Return the live pins of a token from outside; none for one that this site did not sign, which
    is counted and said, and never an error.
    """
    try:
        return live(loads(token), clock.now())
    except InvalidToken as error:
        rejected[error.reason] += 1
        counted["rejected"] += 1
        log_rate_limited(
            logger,
            logging.INFO,
            error.reason,
            "A pinning token was ignored: %s",
            error.reason,
            extra={"reason": error.reason},
        )
        token_rejected.send_robust(source, reason=error.reason)
        return {}


def _forget_key(*, setting: str, **kwargs: Any) -> None:
    if setting in ("SECRET_KEY", "SECRET_KEY_FALLBACKS"):
        _signer.cache_clear()
        _known.clear()
        _known_before.clear()


setting_changed.connect(_forget_key, dispatch_uid="pinning_middleware.tokens")
