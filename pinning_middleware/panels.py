"""
A panel for Django Debug Toolbar: the reads of a request with the alias that served each and its
reason, the request's inherited and outgoing pins, and the state of the servers::

    DEBUG_TOOLBAR_PANELS = [..., "pinning_middleware.panels.PinningPanel"]

``PinningMiddleware`` must come before the toolbar's middleware in ``MIDDLEWARE``.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections import Counter
from contextvars import ContextVar
from typing import Any, Final

from debug_toolbar.panels import Panel
from django.db import connections
from django.http import HttpRequest

from pinning_middleware import stats
from pinning_middleware.pins import PinKind, Pins, Position
from pinning_middleware.reasons import Reason
from pinning_middleware.routing.outgoing import aoutgoing_pins, outgoing_pins
from pinning_middleware.scopes.scope import Scope, entered_scope
from pinning_middleware.utils import clock
from pinning_middleware.utils.counters import Read, observers

__all__ = ["PinningPanel"]

# Maximum length of a stored statement (characters).
MAX_SQL_LENGTH: Final = 300

_COLUMNS = re.compile(r"^SELECT .{20,}? FROM ")
_panel: ContextVar[PinningPanel | None] = ContextVar("pinning_panel", default=None)
_lock = threading.Lock()
_active: set[PinningPanel] = set()


def _observe(read: Read) -> None:
    # Threads and child tasks of a request share its context variables.
    if (panel := _panel.get()) is not None:
        panel.record_read(read)


class PinningPanel(Panel):
    """A toolbar panel. Its content is rendered from the toolbar's store only."""

    is_async = True
    template = "pinning_middleware/panel.html"
    title = "Reads, pins and servers"
    nav_title = "Pinning"
    nav_icon = "pinning_middleware/panel.svg"  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reads: list[dict[str, Any]] = []
        self._pins: dict[str, Any] = {}
        self._outer: PinningPanel | None = None

    @property
    def nav_subtitle(self) -> str:
        """Return the number of reads by role."""
        panel_stats: dict[str, Any] = self.get_stats()  # type: ignore[no-untyped-call]
        counts = Counter(read["role"] for read in panel_stats.get("reads", ()))
        return (
            ", ".join(f"{number} {role}" for role, number in sorted(counts.items())) or "no reads"
        )

    def enable_instrumentation(self) -> None:
        """Start recording the reads of this request."""
        with _lock:
            if self in _active:
                return
            if not _active:
                observers.append(_observe)
            _active.add(self)
        self._outer = _panel.get()
        _panel.set(self)

    def disable_instrumentation(self) -> None:
        """Stop recording; remove the observer with the last active panel."""
        with _lock:
            if self not in _active:
                return
            _active.discard(self)
            if not _active:
                observers.remove(_observe)
        _panel.set(self._outer)

    def record_read(self, read: Read) -> None:
        """Record a read. Called in the thread that ran it."""
        self._reads.append(
            {
                "pool": read.pool,
                "alias": read.alias,
                "served": read.served,
                "role": read.role,
                "reason": read.reason,
                "meaning": Reason(read.reason).description,
                "sql": _shortened(read.sql),
            }
        )

    def process_request(self, request: HttpRequest) -> Any:
        """Record the pins after the view and the inner middleware have run."""
        response = super().process_request(request)  # type: ignore[no-untyped-call]
        if inspect.isawaitable(response):
            return self._arecord_pins(response)
        if (scope := _scope_of_request()) is not None:
            self._pins = _pins(scope, outgoing_pins(scope) if scope.revision else None)
        return response

    async def _arecord_pins(self, awaitable: Any) -> Any:
        response = await awaitable
        if (scope := _scope_of_request()) is not None:
            # The pins stay in the scope, so the middleware does not query the primary again.
            self._pins = _pins(scope, await aoutgoing_pins(scope) if scope.revision else None)
        return response

    def generate_stats(self, request: HttpRequest, response: Any) -> None:
        """Save the recorded data in the toolbar's store."""
        reads = list(self._reads)
        counts = Counter((read["served"], read["reason"], read["meaning"]) for read in reads)
        data = {
            "reads": reads,
            "counts": [(*key, number) for key, number in counts.most_common()],
            "pools": len({read["pool"] for read in reads}),
            "pins": self._pins,
            "servers": [state._asdict() for state in stats.servers()],
        }
        self.record_stats(data)  # type: ignore[no-untyped-call]


def _scope_of_request() -> Scope | None:
    scope = entered_scope()
    return None if scope is None or scope.is_ambient else scope


def _shortened(sql: str) -> str:
    text = _COLUMNS.sub("SELECT … FROM ", " ".join(sql.split()))
    return text if len(text) <= MAX_SQL_LENGTH else f"{text[: MAX_SQL_LENGTH - 1]}…"


def _pins(scope: Scope, outgoing: Pins | None) -> dict[str, Any]:
    return {
        "inherited": _pin_rows(scope.inherited_pins),
        "outgoing": (
            None if outgoing is None or outgoing == scope.inherited_pins else _pin_rows(outgoing)
        ),
    }


def _pin_rows(pins: Pins) -> list[dict[str, Any]]:
    now = clock.now()
    return [
        {
            "pool": key.primary or "every pool",
            "is_observed": key.kind is PinKind.OBSERVED,
            "seconds": max(0.0, pin.until - now),
            "position": _format_position(
                key.primary or "", None if pin.is_primary_only(now) else pin.position
            ),
        }
        for key, pin in pins.items()
        if key.kind is not PinKind.DRY_RUN
    ]


def _format_position(alias: str, position: Position | None) -> str:
    """Return a position in the database's own notation, or "" if there is none."""
    is_lsn = alias in connections and connections[alias].vendor == "postgresql"
    found = []
    for name, point in position.points.items() if position is not None else ():
        if not is_lsn:
            found.append(f"{name}:{point}")
        elif name.partition("-")[0].endswith("x"):
            found.append(f"transaction {point}")
        else:
            found.append(f"{point >> 32:X}/{point & 0xFFFFFFFF:X}")
    return ", ".join(found)
