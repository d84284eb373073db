"""
Django Debug Toolbar: where each read of a request went and why, the pins that the request came with
and leaves, and what is known of the servers::

    DEBUG_TOOLBAR_PANELS = [..., "pinning_middleware.panels.PinningPanel"]

``PinningMiddleware`` stands before the toolbar's in ``MIDDLEWARE``.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections import Counter
from contextvars import ContextVar
from typing import Any, Final

from asgiref.sync import sync_to_async
from debug_toolbar.panels import Panel
from django.db import connections
from django.http import HttpRequest

from pinning_middleware import stats
from pinning_middleware.pins import OPTIONAL, SEEN, Pins, Position
from pinning_middleware.reasons import Reason
from pinning_middleware.routing.outgoing import asks_database, has_changed, outgoing_pins
from pinning_middleware.scopes.scope import Scope, entered_scope
from pinning_middleware.utils import clock
from pinning_middleware.utils.counters import Read, observers

__all__ = ["PinningPanel"]

# Characters of a statement that are kept.
LONGEST: Final = 300

_COLUMNS = re.compile(r"^SELECT .{20,}? FROM ")
_panel: ContextVar[PinningPanel | None] = ContextVar("pinning_panel", default=None)
_lock = threading.Lock()
_watching: set[PinningPanel] = set()


def _observe(read: Read) -> None:
    # The context is the request's own, in its threads and child tasks too.
    if (panel := _panel.get()) is not None:
        panel.note(read)


class PinningPanel(Panel):
    """A panel of the toolbar; its content comes from the toolbar's store alone."""

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
        """How many reads went to whom."""
        known: dict[str, Any] = self.get_stats()  # type: ignore[no-untyped-call]
        counts = Counter(read["role"] for read in known.get("reads", ()))
        return ", ".join(f"{number} {role}" for role, number in sorted(counts.items())) or "no read"

    def enable_instrumentation(self) -> None:
        """Watch the reads of this request."""
        with _lock:
            if self in _watching:
                return
            if not _watching:
                observers.append(_observe)
            _watching.add(self)
        self._outer = _panel.get()
        _panel.set(self)

    def disable_instrumentation(self) -> None:
        """Watch no longer; with the last request, nobody does."""
        with _lock:
            if self not in _watching:
                return
            _watching.discard(self)
            if not _watching:
                observers.remove(_observe)
        _panel.set(self._outer)

    def note(self, read: Read) -> None:
        """Note a read, in the thread that made it."""
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
        """Look at the pins when the view and what is around it are over."""
        response = super().process_request(request)  # type: ignore[no-untyped-call]
        if inspect.isawaitable(response):
            return self._awaited(response)
        if (scope := _scope_of_request()) is not None:
            self._pins = _pins(scope, outgoing_pins(scope) if has_changed(scope) else None)
        return response

    async def _awaited(self, awaitable: Any) -> Any:
        response = await awaitable
        if (scope := _scope_of_request()) is not None:
            left = None
            if has_changed(scope) and asks_database(scope):
                # The middleware asks for the same right after, and gets this very answer.
                left = await sync_to_async(outgoing_pins)(scope)
            elif has_changed(scope):
                left = outgoing_pins(scope)
            self._pins = _pins(scope, left)
        return response

    def generate_stats(self, request: HttpRequest, response: Any) -> None:
        """Keep what was seen in the toolbar's store."""
        reads = list(self._reads)
        counts = Counter((read["served"], read["reason"], read["meaning"]) for read in reads)
        found = {
            "reads": reads,
            "counts": [(*key, number) for key, number in counts.most_common()],
            "pools": len({read["pool"] for read in reads}),
            "pins": self._pins,
            "servers": [state._asdict() for state in stats.servers()],
        }
        self.record_stats(found)  # type: ignore[no-untyped-call]


def _scope_of_request() -> Scope | None:
    scope = entered_scope()
    return None if scope is None or scope.is_lasting else scope


def _shortened(sql: str) -> str:
    text = _COLUMNS.sub("SELECT … FROM ", " ".join(sql.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _pins(scope: Scope, left: Pins | None) -> dict[str, Any]:
    return {
        "carried": _told(scope.carried),
        "left": None if left is None or left == scope.carried else _told(left),
    }


def _told(pins: Pins) -> list[dict[str, Any]]:
    now = clock.now()
    return [
        {
            "pool": key.removeprefix(SEEN),
            "is_seen": key.startswith(SEEN),
            "seconds": max(0.0, pin.until - now),
            "position": _written(key.removeprefix(SEEN), pin.waits_for(now)),
        }
        for key, pin in pins.items()
    ]


def _written(alias: str, position: Position | None) -> str:
    """Return a position as its database writes it, empty where only time ends the pin."""
    is_lsn = alias in connections and connections[alias].vendor == "postgresql"
    found = []
    for log, point in (position or {}).items():
        name = log.removeprefix(OPTIONAL)
        if not is_lsn:
            found.append(f"{name}:{point}")
        elif name.partition("-")[0].endswith("x"):
            found.append(f"transaction {point}")
        else:
            found.append(f"{point >> 32:X}/{point & 0xFFFFFFFF:X}")
    return ", ".join(found)
