from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

from pinning_middleware.pins import Position
from pinning_middleware.servers.server import Identity, Report, Server

__all__ = ["Ask", "CannotTell", "Family", "Row", "Who"]

Row: TypeAlias = tuple[Any, ...]
# Runs one statement on one connection and returns its first row, `()` for none.
Ask: TypeAlias = Callable[[str], Row]


class CannotTell(Exception):
    """This server does not say how far it is: a fact of it, and no failure."""


class Who(NamedTuple):
    """
    Which server a connection leads to, the id of the session there (``None``: there is none to
    compare), and whether it hides from this role on which timeline it is.
    """

    identity: Identity
    session: int | None = None
    is_discreet: bool = False


class Family:
    """
    The questions to a family of databases, as statements and what their rows mean. They run in
    autocommit, one at a time.
    """

    # The driver's parameters that bound a connection attempt, in seconds.
    connect_timeout: ClassVar[str] = "connect_timeout"
    # What a replica raises by design, and another node would not: SQLSTATEs or error numbers.
    passing_errors: ClassVar[frozenset[Any]] = frozenset()
    # Of those, what says that the connection is gone.
    lost_errors: ClassVar[frozenset[Any]] = frozenset()
    # Codes by which a server refuses a question for good.
    refusals: ClassVar[frozenset[Any]] = frozenset()

    def ways(self, choice: bool | str) -> tuple[int, ...]:
        """Return the ways to tell positions that a setting allows, the best first."""
        return (0,)

    def identify(self, ask: Ask, driver: tuple[str, int], way: int | None) -> tuple[Who, Row]:
        """
        Return which server a connection leads to and, where one statement tells both, the row
        that ``read`` takes. ``driver``: the host and port that the driver knows. ``way``: how to
        tell how far it is, ``None``: not at all.
        """
        raise NotImplementedError

    def system(self, ask: Ask, identity: Identity) -> str:
        """Return the name that all servers of one cluster share, empty for none."""
        return ""

    def followed(self, ask: Ask) -> str:
        """
        Return the timeline that a server is on or has passed, of one that hides from this role
        which it is on now; empty: it can't be told.
        """
        return ""

    def report(self, ask: Ask, server: Server, way: int) -> Row:
        """Ask a server what ``read`` takes."""
        raise NotImplementedError

    def read(self, row: Row, server: Server, way: int) -> Report:
        """Return what a server says of itself. Raises ``CannotTell`` for one that does not."""
        raise NotImplementedError

    def reached(self, wanted: Position, known: Position) -> bool:
        """Return whether a node that is known to have replayed ``known`` has ``wanted``."""
        return all(known.get(log, -1) >= point for log, point in wanted.items())

    def error_code(self, error: BaseException) -> Any:
        """Return the driver's code of an error that Django wrapped, ``None`` for no code."""
        raise NotImplementedError

    def is_lost(self, error: BaseException) -> bool:
        """Return whether an error says that the connection is gone."""
        return self.error_code(error) in self.lost_errors

    def is_passing(self, error: BaseException) -> bool:
        """Return whether another node would not share an error."""
        return self.error_code(error) in self.passing_errors
