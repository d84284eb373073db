"""The pin of the current user, for display."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from pinning_middleware import is_pinned
from pinning_middleware.conf import conf
from pinning_middleware.scopes.scope import entered_scope

from .recording import Recording

Reason = Literal["off", "wrote", "carried", "none"]


@dataclass(frozen=True)
class PinStatus:
    """Whether the user is pinned, why, and for how long at most."""

    reason: Reason
    seconds_left: float = 0.0

    @property
    def pinned(self) -> bool:
        """Whether a pin is active."""
        return self.reason in {"wrote", "carried"}


def pin_status(recording: Recording, switched_off: bool) -> PinStatus:
    """Read the pin inside the request's scope."""
    if switched_off:
        return PinStatus("off")
    if not is_pinned():
        return PinStatus("none")
    if recording.wrote:
        return PinStatus("wrote", conf.seconds)
    scope = entered_scope()
    ends = [pin.until for pin in scope.inherited_pins.values()] if scope is not None else []
    return PinStatus("carried", max(0.0, max(ends, default=0.0) - time.time()))
