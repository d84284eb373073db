"""Advance the windows of pins in a test."""

from __future__ import annotations

from pinning_middleware.utils import clock

# Tokens round times to milliseconds.
_ROUNDING = 0.001
_ahead = 0.0


def advance_window(seconds: float) -> None:
    """
    Advance the windows of pins by this many seconds, until the end of the test.

    No other clock changes, so this also works with freezegun and time-machine. Raise ValueError if
    the number is negative.
    """
    global _ahead
    if seconds < 0:
        raise ValueError(f"advance_window({seconds!r}): seconds must not be negative")
    _ahead += seconds + _ROUNDING
    clock.set_ahead(_ahead)


def reset_window() -> None:
    """Undo ``advance_window()``."""
    global _ahead
    _ahead = 0.0
    clock.set_ahead(0.0)
