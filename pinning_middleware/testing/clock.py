"""Windows, moved on by a test."""

from __future__ import annotations

from pinning_middleware.utils import clock

__all__ = ["reset_step", "step"]

# A token counts whole milliseconds, and rounds.
_ROUNDING = 0.001
_ahead = 0.0


def step(seconds: float) -> None:
    """
    Let so many seconds pass for the windows of pins, and for nothing else: no other clock moves,
    so that it works beside freezegun and time-machine. It holds until the test is over.

    ``ValueError`` for a negative number: no window opens again.
    """
    global _ahead
    if seconds < 0:
        raise ValueError(f"step({seconds!r}): windows move on, not back")
    _ahead += seconds + _ROUNDING
    clock.set_ahead(_ahead)


def reset_step() -> None:
    """Let windows end when the machine's clock says so."""
    global _ahead
    _ahead = 0.0
    clock.set_ahead(0.0)
