from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

from pinning_middleware.pins import Position
from pinning_middleware.servers.registry import Identity, Report, Server

__all__ = ["Dialect", "Identification", "PositionUnavailable", "Query", "Row"]

Row: TypeAlias = tuple[Any, ...]
# Runs one statement on one connection and returns its first row, `()` for none.
Query: TypeAlias = Callable[[str], Row]


class PositionUnavailable(Exception):
    """This server does not say how far it is: a fact of it, and no failure."""


class Identification(NamedTuple):
    """
    Which server a connection leads to, the id of the session there (``None``: there is none to
    compare), and whether it hides from this role on which timeline it is.
    """

    identity: Identity
    session: int | None = None
    lacks_timeline_privilege: bool = False


class Dialect:
    """
    The questions to a dialect of databases, as statements and what their rows mean. They run in
    autocommit, one at a time.
    """

    # The driver's parameters that bound a connection attempt, in seconds.
    connect_timeout: ClassVar[str] = "connect_timeout"
    # What a replica raises by design, and another node would not: SQLSTATEs or error numbers.
    retryable_errors: ClassVar[frozenset[Any]] = frozenset()
    # Of those, what says that the connection is gone.
    connection_lost_errors: ClassVar[frozenset[Any]] = frozenset()
    # Codes by which a server refuses a question for good.
    permission_errors: ClassVar[frozenset[Any]] = frozenset()

    def strategies(self, choice: bool | str) -> tuple[int, ...]:
        """Return the ways to tell positions that a setting allows, the best first."""
        return (0,)

    def identify(
        self, ask: Query, driver: tuple[str, int], way: int | None
    ) -> tuple[Identification, Row]:
        """
        Return which server a connection leads to and, where one statement tells both, the row
        that ``read`` takes. ``driver``: the host and port that the driver knows. ``way``: how to
        tell how far it is, ``None``: not at all.
        """
        raise NotImplementedError

    def system(self, ask: Query, identity: Identity) -> str:
        """Return the name that all servers of one cluster share, empty for none."""
        return ""

    def checkpoint_timeline(self, ask: Query) -> str:
        """
        Return the timeline that a server is on or has passed, of one that hides from this role
        which it is on now; empty: it can't be told.
        """
        return ""

    def report(self, ask: Query, server: Server, way: int) -> Row:
        """Query a server what ``read`` takes."""
        raise NotImplementedError

    def read(self, row: Row, server: Server, way: int) -> Report:
        """Return what a server says of itself. Raises ``PositionUnavailable`` for one that does not."""
        raise NotImplementedError

    def reached(self, wanted: Position, known: Position) -> bool:
        """Return whether a node that is known to have replayed ``known`` has ``wanted``."""
        return all(known.get(log, -1) >= point for log, point in wanted.items())

    def error_code(self, error: BaseException) -> Any:
        """Return the driver's code of an error that Django wrapped, ``None`` for no code."""
        raise NotImplementedError

    def is_lost(self, error: BaseException) -> bool:
        """Return whether an error says that the connection is gone."""
        return self.error_code(error) in self.connection_lost_errors

    def is_retryable(self, error: BaseException) -> bool:
        """Return whether another node would not share an error."""
        return self.error_code(error) in self.retryable_errors
