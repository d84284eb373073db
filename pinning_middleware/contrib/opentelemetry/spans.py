"""
Span attributes of reads, and spans of waits for a replica.

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

__all__ = ["annotate", "wait_receiver"]

# On spans of incoming requests and messages, server.address is the site's own address.
_INCOMING: Final = (SpanKind.SERVER, SpanKind.CONSUMER)


def annotate(read: Read) -> None:
    """Add the server of a read to the current span; later reads of a span overwrite it."""
    span = get_current_span()
    if not span.is_recording():
        return
    attributes: dict[str, AttributeValue] = {
        "pinning_middleware.pool": read.pool,
        "pinning_middleware.alias": read.served,
        "pinning_middleware.role": read.role,
        "pinning_middleware.reason": read.reason,
    }
    address, port = _address(read)
    if address:
        attributes["pinning_middleware.server.address"] = address
        attributes["pinning_middleware.server.port"] = port
        if getattr(span, "kind", None) not in _INCOMING:
            attributes["server.address"], attributes["server.port"] = address, port
    span.set_attributes(attributes)


def _address(read: Read) -> tuple[str, int]:
    """Return the host and port of the server, from the driver if it is unidentified."""
    if read.server is not None:
        address, port = read.server.identity.host_and_port
        return address, port
    if read.connection is None:
        return "", 0
    info = getattr(read.connection.connection, "info", None)
    settings = read.connection.settings_dict
    found = getattr(info, "port", None) or settings["PORT"] or 0
    return str(getattr(info, "host", None) or settings["HOST"] or ""), int(found)


def wait_receiver(tracer: Tracer) -> Callable[..., None]:
    """Return a receiver of ``replica_wait_finished`` that creates a span for each wait."""

    def receive(
        sender: str, replica: str | None, seconds: float, reached: bool, **kwargs: Any
    ) -> None:
        if not get_current_span().is_recording():
            return
        now = time.time_ns()
        span = tracer.start_span(
            "pinning_middleware.wait",
            start_time=now - int(seconds * 1e9),
            attributes={
                "pinning_middleware.pool": sender,
                **({} if replica is None else {"pinning_middleware.alias": replica}),
                "pinning_middleware.reached": reached,
            },
        )
        span.end(now)

    return receive
