"""
What spans are told: who answered a read, and how long a scope waited for a replica.

``server.address`` and ``server.port`` are those of OpenTelemetry's semantic conventions.
https://opentelemetry.io/docs/specs/semconv/registry/attributes/server/
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from opentelemetry.trace import SpanKind, Tracer, get_current_span
from opentelemetry.util.types import AttributeValue

from pinning_middleware.utils.counters import Read

__all__ = ["annotate", "waits"]

# Spans of what was asked of this site: there the address of the server is the site's own.
_OF_THE_SITE: Final = (SpanKind.SERVER, SpanKind.CONSUMER)


def annotate(read: Read) -> None:
    """Tell the current span who answered, if it records. The last read of a span stays there."""
    span = get_current_span()
    if not span.is_recording():
        return
    found: dict[str, AttributeValue] = {
        "pinning_middleware.pool": read.pool,
        "pinning_middleware.alias": read.served,
        "pinning_middleware.role": read.role,
        "pinning_middleware.reason": read.reason,
    }
    address, port = _place(read)
    if address:
        found["pinning_middleware.server.address"] = address
        found["pinning_middleware.server.port"] = port
        if getattr(span, "kind", None) not in _OF_THE_SITE:
            found["server.address"], found["server.port"] = address, port
    span.set_attributes(found)


def _place(read: Read) -> tuple[str, int]:
    """Return the host and port of the server, as far as the driver knows while nobody asked it."""
    if read.server is not None:
        address, port = read.server.identity.place
        return address, port
    if read.connection is None:
        return "", 0
    info = getattr(read.connection.connection, "info", None)
    settings = read.connection.settings_dict
    found = getattr(info, "port", None) or settings["PORT"] or 0
    return str(getattr(info, "host", None) or settings["HOST"] or ""), int(found)


def waits(tracer: Tracer) -> Callable[..., None]:
    """Return a receiver of ``replica_wait_finished`` that makes a span of each wait in a trace."""

    def receive(sender: str, replica: str, seconds: float, reached: bool, **kwargs: Any) -> None:
        if not get_current_span().is_recording():
            return
        now = time.time_ns()
        span = tracer.start_span(
            "pinning_middleware.wait",
            start_time=now - int(seconds * 1e9),
            attributes={
                "pinning_middleware.pool": sender,
                "pinning_middleware.alias": replica,
                "pinning_middleware.reached": reached,
            },
        )
        span.end(now)

    return receive
