"""
Pins, which a scope that has written propagates to later scopes.

A position maps the name of a log to an offset in it. One log is a history in which a larger
offset includes every smaller one: a PostgreSQL timeline, a MariaDB domain as one server wrote it, a
MySQL UUID. What follows a gap in the numbers is a log by itself ("uuid/7"). Offsets of different
logs are never compared, so merging takes the maximum for each log, and nothing here depends on the
database that a position came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple, TypeAlias

# Seconds after a write for which a position is honoured until a replica has reached it.
POSITION_LIFETIME: Final = 86_400.0

# Log name → offset: what a server has replayed.
Points: TypeAlias = Mapping[str, int]


class Position(NamedTuple):
    """
    A point in a primary's log that a replica may have reached.

    ``points``: log name → offset, never empty. ``optional``: those of the logs that count only for
    a replica that replicates them at all.
    """

    points: Points
    optional: frozenset[str] = frozenset()


class PoolKey(NamedTuple):
    """
    Identifies a pool: the alias of its primary, and whether its rotation is that of
    ``SLAVE_DATABASES``. Both rotations of one primary share their pins.
    """

    primary: str
    legacy: bool = False


class PinKind(StrEnum):
    """
    What a pin protects: what a client has written, or what it has read (``monotonic-reads``). That
    of a dry run protects nothing: it records when the client wrote. The value is that of the
    serialised form.
    """

    WRITTEN = "w"
    OBSERVED = "o"
    DRY_RUN = "d"


class PinKey(NamedTuple):
    """
    Identifies a pin: the alias of a primary, and the kind of the pin. The alias is None, for every
    pool, only inside a token that would be too long with all of them.
    """

    primary: str | None
    kind: PinKind = PinKind.WRITTEN

    def dump(self) -> str:
        """Return the serialised form, which ``load()`` takes."""
        return self.kind.value if self.primary is None else f"{self.kind.value}:{self.primary}"

    @classmethod
    def load(cls, text: str) -> PinKey:
        """Return the key of a serialised form. Raise ValueError if it is not one."""
        kind, colon, primary = text.partition(":")
        return cls(primary if colon else None, PinKind(kind))


class Pin(NamedTuple):
    """
    The reads of a pool go to the primary until ``until`` (seconds since the epoch), or to a replica
    that has reached ``position``.

    ``primary_only_until``: until when a position does not count, because part of the window came
    from a write whose position is unknown; None: it counts at once. A pin without a position
    requires the primary until its end.
    """

    until: float
    primary_only_until: float | None = None
    position: Position | None = None

    @property
    def primary_only_end(self) -> float:
        """The end of the time in which only the primary may be read (seconds since the epoch)."""
        return self.until if self.position is None else self.primary_only_until or -math.inf

    def is_primary_only(self, now: float) -> bool:
        """Return whether only the primary may be read at this time."""
        return self.primary_only_end > now

    def is_live(self, now: float, window: float = 0.0) -> bool:
        """
        Return whether the pin still counts. A position counts until it is reached, for at most
        ``POSITION_LIFETIME`` after the write, which was ``window`` seconds before ``until``.
        """
        if self.until > now:
            return True
        return self.position is not None and self.until - window + POSITION_LIFETIME > now

    def merge(self, other: Pin) -> Pin:
        """
        Return a pin that includes both: the latest ends and the newest position.

        The order of two pins does not matter. That of several does only if their logs differ: it
        then may decide which position counts after all windows. In any order, each pin counts at
        least until its own ``until``.
        """
        older, newer = sorted((self, other), key=_by_age)
        end = max(self.primary_only_end, other.primary_only_end)
        if not _includes_logs(newer.position, older.position):
            # Replicas may never follow the older log again, so only its window ends the pin.
            end = max(end, older.until)
            return _pin(newer.until, end, newer.position)
        return _pin(newer.until, end, merge_positions(self.position, other.position))


def _by_age(pin: Pin) -> tuple[float, list[tuple[str, int]]]:
    return pin.until, sorted(pin.position.points.items()) if pin.position else []


def _pin(until: float, primary_only_end: float, position: Position | None) -> Pin:
    return Pin(until, primary_only_end if math.isfinite(primary_only_end) else None, position)


Pins: TypeAlias = Mapping[PinKey, Pin]


def pins_of(pins: Pins, primary: str) -> tuple[Pin | None, Pin | None]:
    """Return the pins of one pool: for what was written, and for what was read."""
    return pins.get(PinKey(primary)), pins.get(PinKey(primary, PinKind.OBSERVED))


def merge_points(one: Points, other: Points) -> Points:
    """Return the larger offset of each log."""
    if not one or not other:
        return one or other
    return {log: max(one.get(log, -1), other.get(log, -1)) for log in (*one, *other)}


def merge_positions(one: Position | None, other: Position | None) -> Position | None:
    """Return the smallest position that includes both."""
    if one is None or other is None:
        return one or other
    required = (one.points.keys() - one.optional) | (other.points.keys() - other.optional)
    points = merge_points(one.points, other.points)
    return Position(points, frozenset(points.keys() - required))


def _includes_logs(newer: Position | None, older: Position | None) -> bool:
    """Return whether the newer position has every log that the older one requires."""
    if newer is None or older is None:
        return True
    return logs_of(older.points.keys() - older.optional) <= logs_of(newer.points)


def logs_of(names: Iterable[str]) -> set[str]:
    """Return the logs; the part of a log after a gap is named "log/first"."""
    return {name.partition("/")[0] for name in names}


def merge_optional(one: Pin | None, other: Pin | None) -> Pin | None:
    """Return the merged pin, or None if both are None."""
    if one is None or other is None:
        return one if other is None else other
    return one.merge(other)


def merge_pins(*several: Pins) -> dict[PinKey, Pin]:
    """Return the pins of all, merged by their keys."""
    merged: dict[PinKey, Pin] = {}
    for pins in several:
        for key, pin in pins.items():
            known = merged.get(key)
            merged[key] = pin if known is None else known.merge(pin)
    return merged


def live(pins: Pins, now: float, window: float = 0.0) -> dict[PinKey, Pin]:
    """Return the pins that still count; ``window`` as for ``Pin.is_live()``."""
    return {key: pin for key, pin in pins.items() if pin.is_live(now, window)}


def within_window(pins: Pins, now: float) -> dict[PinKey, Pin]:
    """Return the pins whose window has not ended, for stores that keep them no longer."""
    return {key: pin for key, pin in pins.items() if pin.until > now}


def pack(pins: Pins) -> dict[str, list[Any]]:
    """
    Return the pins in a form for JSON, which ``unpack()`` takes. Times are in seconds since the
    epoch, rounded to milliseconds.
    """
    return {key.dump(): _pack_pin(pin) for key, pin in pins.items()}


def _pack_pin(pin: Pin) -> list[Any]:
    row: list[Any] = [round(pin.until, 3)]
    if pin.position is not None:
        end = pin.primary_only_until
        row += [None if end is None else round(end, 3), dict(pin.position.points)]
        if pin.position.optional:
            row.append(sorted(pin.position.optional))
    return row


def unpack(packed: object) -> dict[PinKey, Pin]:
    """Return the pins from the output of ``pack()``. Raise ValueError for anything else."""
    if not isinstance(packed, dict):
        raise ValueError("pins must be a mapping")
    return {PinKey.load(_text(key)): _unpack_pin(row) for key, row in packed.items()}


def _unpack_pin(row: object) -> Pin:
    if not isinstance(row, list) or len(row) not in (1, 3, 4):
        raise ValueError("a pin must be a list of one, three or four values")
    if len(row) == 1:
        return Pin(_number(row[0]))
    end = None if row[1] is None else _number(row[1])
    return Pin(_number(row[0]), end, _unpack_position(*row[2:]))


def _unpack_position(points: object, optional: object = ()) -> Position:
    if not isinstance(points, dict) or not points:
        raise ValueError("a position must map names of logs to offsets")
    if not all(type(offset) is int for offset in points.values()):
        raise ValueError("offsets must be integers")
    if not isinstance(optional, (list, tuple)):
        raise ValueError("optional logs must be a list")
    return Position({_text(log): n for log, n in points.items()}, frozenset(map(_text, optional)))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("names must be strings")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("times must be finite numbers")
    return value
