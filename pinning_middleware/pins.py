"""
The pin: what a writer carries from one scope to the next, and how it is written down.

Positions are maps from a log's name to a point in it. One log is a history in which a larger
point includes every smaller one: a PostgreSQL timeline, a MariaDB domain as one server wrote it,
a MySQL server's UUID. Points of different logs are never compared, so merging is the maximum of
each log, and nothing here needs to know which database a position came from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

__all__ = [
    "OPTIONAL",
    "SEEN",
    "Pin",
    "Pins",
    "Position",
    "live",
    "merge_pins",
    "merge_positions",
    "pack",
    "unpack",
]

Position: TypeAlias = Mapping[str, int]
# Before the name of a log that counts only for a replica that follows it at all.
OPTIONAL = "?"
# Before a primary's alias: what a client has seen there, which is no write of its own.
SEEN = "~"


class Pin(NamedTuple):
    """
    A pool's reads belong to the primary until ``until`` (seconds since the epoch), or to a
    replica that has replayed ``position``. Until ``held`` a position does not count: that is the
    part of the window that came from a write whose position is not known. ``Pin(until)``, without
    a position, is held until then.
    """

    until: float
    held: float = 0.0
    position: Position | None = None

    @property
    def held_until(self) -> float:
        """Until when only the primary will do, in seconds since the epoch."""
        return self.held if self.position else self.until

    def merge(self, other: Pin) -> Pin:
        """Return the pin that keeps both promises: the latest ends and the newest position."""
        newer, older = (self, other) if self.until >= other.until else (other, self)
        held = max(self.held_until, other.held_until)
        if not _comparable(self.position, other.position):
            # The older log may be one that no replica will follow any more: let time end it.
            held = max(held, older.until)
            return Pin(newer.until, held, newer.position)
        return Pin(newer.until, held, merge_positions(self.position, other.position))

    def waits_for(self, now: float) -> Position | None:
        """Return the position that frees this pin before its end; ``None``: only time does."""
        return self.position if self.position and self.held <= now else None


Pins: TypeAlias = Mapping[str, Pin]


def merge_positions(one: Position | None, other: Position | None) -> Position | None:
    """Return the smallest position that includes both."""
    if not one or not other:
        return one or other
    if one.keys() == other.keys():
        return {log: max(point, other[log]) for log, point in one.items()}
    points: dict[str, int] = {}
    for log, point in (*one.items(), *other.items()):
        name = log.removeprefix(OPTIONAL)
        points[name] = max(points.get(name, -1), point)
    required = {log for log in (*one, *other) if not log.startswith(OPTIONAL)}
    return {n if n in required else OPTIONAL + n: point for n, point in points.items()}


def _comparable(one: Position | None, other: Position | None) -> bool:
    names = [{log.removeprefix(OPTIONAL) for log in position or ()} for position in (one, other)]
    return not all(names) or names[0] == names[1]


def merge_pins(*several: Pins) -> dict[str, Pin]:
    """Return the pins of all, merged by their primary's alias."""
    merged: dict[str, Pin] = {}
    for pins in several:
        for alias, pin in pins.items():
            known = merged.get(alias)
            merged[alias] = pin if known is None else known.merge(pin)
    return merged


def live(pins: Pins, now: float) -> dict[str, Pin]:
    """Return the pins whose window has not ended."""
    return {alias: pin for alias, pin in pins.items() if pin.until > now}


def pack(pins: Pins) -> dict[str, list[Any]]:
    """Return what ``unpack`` takes: lists that JSON can say, trailing blanks left out."""
    packed: dict[str, list[Any]] = {}
    for alias, pin in pins.items():
        row: list[Any] = [round(pin.until, 3)]
        if pin.held or pin.position:
            row.append(round(pin.held, 3))
        if pin.position:
            row.append(dict(pin.position))
        packed[alias] = row
    return packed


def unpack(packed: object) -> dict[str, Pin]:
    """Return the pins that ``pack`` wrote; ``ValueError`` for anything else."""
    if not isinstance(packed, dict):
        raise ValueError("pins are a mapping")
    return {_text(alias): _pin(row) for alias, row in packed.items()}


def _pin(row: object) -> Pin:
    if not isinstance(row, list) or not 1 <= len(row) <= 3:
        raise ValueError("a pin is a list of one to three values")
    held = row[1] if len(row) > 1 else 0.0
    position = row[2] if len(row) > 2 else None
    return Pin(_number(row[0]), _number(held), _position(position))


def _position(position: object) -> Position | None:
    if position is None:
        return None
    if not isinstance(position, dict) or not all(type(p) is int for p in position.values()):
        raise ValueError("a position maps names of logs to whole numbers")
    return {_text(log): point for log, point in position.items()}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("names are text")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("times are finite numbers")
    return value
