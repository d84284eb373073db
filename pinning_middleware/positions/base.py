from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.pins import Position

__all__ = ["Positions", "Report", "fetch"]


class Report(NamedTuple):
    """What a node says of itself: whether it replays another's log, and how far it is."""

    is_replica: bool
    position: Position


class Positions:
    """
    The questions to a family of databases. Each may raise ``django.db.Error``. None is asked
    inside a transaction.
    """

    # The key of the driver's parameters that bounds a connection attempt, in seconds.
    connect_timeout: ClassVar[str | None] = None
    # What a replica raises by design, and another node would not: SQLSTATEs or error numbers.
    passing_errors: ClassVar[frozenset[Any]] = frozenset()

    def current(self, connection: BaseDatabaseWrapper) -> Position | None:
        """
        Return a position that includes all that this connection has committed, ``None`` where the
        database keeps no log. Asked of a primary.
        """
        raise NotImplementedError

    def report(self, connection: BaseDatabaseWrapper) -> Report:
        """Return how far a replica is."""
        raise NotImplementedError

    def behind(self, connection: BaseDatabaseWrapper) -> float | None:
        """
        Return for how many seconds at most a replica has been behind, ``None`` where it can't
        tell. Asked only where its position is behind the primary's: idle is not lag.
        """
        return None

    def reached(self, wanted: Position, known: Position) -> bool:
        """Return whether a node that is known to have replayed ``known`` has ``wanted``."""
        return all(known.get(log, -1) >= point for log, point in wanted.items())

    def is_certain(self, position: Position) -> bool:
        """Return whether a replica's position says of which log it is."""
        return True

    def ascertain(self, position: Position, primary: Position) -> Position:
        """
        Return a replica's position with its log's name, given what the primary said afterwards.
        """
        return position

    def wait(self, connection: BaseDatabaseWrapper, wanted: Position, seconds: float) -> bool:
        """
        Let a replica wait until it has replayed ``wanted``, at most so long. ``False``: this
        database can't, and has to be asked again and again.
        """
        return False

    def error_code(self, error: BaseException) -> Any:
        """Return the driver's code of an error that Django wrapped, ``None`` for no code."""
        raise NotImplementedError


def fetch(connection: BaseDatabaseWrapper, sql: str) -> tuple[Any, ...]:
    """Return the first row of a statement that runs on its own; ``()`` for none."""
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone() or ()
