"""The interface of a dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

from pinning_middleware.pins import Points, Position
from pinning_middleware.servers.registry import Identity, Report, Server

Row: TypeAlias = tuple[Any, ...]
# Runs one statement on one connection and returns its first row, or `()` if there is none.
Query: TypeAlias = Callable[[str], Row]


class PositionUnavailable(Exception):
    """The server reports no position, although it answers. Not a failure of the server."""


class Driver(NamedTuple):
    """
    What the driver knows of the server at the other end.

    ``version``: as the server reported it when it was connected to, or an empty string.
    """

    host: str
    port: int
    version: str = ""


class Identification(NamedTuple):
    """
    The identity of the server behind a connection.

    ``session``: the session's ID as the server reports it, or None if it has none to compare.
    ``lacks_timeline_privilege``: the role may not see the server's timeline.
    """

    identity: Identity
    session: int | None = None
    lacks_timeline_privilege: bool = False


class Refusal(NamedTuple):
    """
    Why a standby refuses a statement that a primary may run.

    ``is_write``: the statement writes, although it looks like a read. ``all_reads``: the standby
    refuses every read of the role. ``tables``: those of the database that no standby can read.
    ``is_lasting``: the standby will refuse the same statement again.
    """

    is_write: bool = False
    all_reads: bool = False
    tables: tuple[str, ...] = ()
    is_lasting: bool = True


class Dialect:
    """
    The statements that probe a database, and the meaning of their rows.

    A dialect may have several strategies to report a position, which are numbered. Statements run
    in autocommit, one at a time; errors of the database propagate.
    """

    # The driver's connection parameter for a timeout (seconds).
    connect_timeout: ClassVar[str] = "connect_timeout"
    # Codes (SQLSTATE or number) of errors that another server would not raise.
    retryable_errors: ClassVar[frozenset[Any]] = frozenset()
    # The subset of them after which the connection is lost.
    connection_lost_errors: ClassVar[frozenset[Any]] = frozenset()
    # A statement whose only column is whether replay waits for a lock that a query holds; empty if
    # replay never does.
    replay_waits: ClassVar[str] = ""
    # A statement whose only column is the number of commits that replicas may show already although
    # the primary does not; empty if there are none.
    waiting_commits: ClassVar[str] = ""
    # Codes of errors that a server raises because a lock was not granted in time.
    lock_errors: ClassVar[frozenset[Any]] = frozenset()
    # Codes of errors that a server raises if a lock was not granted in time, or for other reasons.
    timeout_errors: ClassVar[frozenset[Any]] = frozenset()
    # Codes of errors for a write to a server that is read-only, as a replica is.
    read_only_errors: ClassVar[frozenset[Any]] = frozenset()
    # Codes of errors for a statement that is not permitted, or not supported.
    permission_errors: ClassVar[frozenset[Any]] = frozenset()

    def strategies(self, setting: bool | str) -> tuple[int, ...]:
        """Return the strategies that a value of PINNING_POSITIONS allows, the best first."""
        return (0,)

    def identify(
        self, query: Query, driver: Driver, strategy: int | None
    ) -> tuple[Identification, Row]:
        """
        Return the identity of a server, and the row for ``read``, fetched by one statement.

        With ``strategy`` None the row is empty.
        """
        raise NotImplementedError("subclasses of Dialect must provide an identify() method")

    def system(self, query: Query, identity: Identity) -> str:
        """Return the name that all servers of a cluster share, or an empty string."""
        return ""

    def checkpoint_timeline(self, query: Query) -> str | None:
        """Return a timeline that the server has reached, or None if unknown."""
        return None

    def balances_reads(self, query: Query) -> bool:
        """
        Return whether a pooler of this database sends reads and writes to different servers. It is
        called behind a pooler; an error of the statement means that it does not.
        """
        return False

    def report(self, query: Query, server: Server, strategy: int) -> Row:
        """Return the row for ``read``."""
        raise NotImplementedError("subclasses of Dialect must provide a report() method")

    def read(self, row: Row, server: Server, strategy: int) -> Report:
        """Return a row as a report. Raise ``PositionUnavailable`` if it contains no position."""
        raise NotImplementedError("subclasses of Dialect must provide a read() method")

    def reached(self, wanted: Position, replayed: Points) -> bool:
        """Return whether a server that has replayed ``replayed`` has caught up with ``wanted``."""
        return all(replayed.get(log, -1) >= point for log, point in wanted.points.items())

    def supersedes(self, points: Points, other: Points) -> bool:
        """Return whether a server with these points has replaced the one with the other points."""
        return False

    def foreign_points(self, position: Position, server: Server, replayed: Points) -> Points:
        """
        Return the points of a position that only another primary can have written, and that a
        server which has replayed ``replayed`` lacks: if there are any, it is a former primary.
        """
        is_later = self.supersedes(position.points, replayed)
        return position.points if is_later else {}

    def session_search(self, session: int) -> str:
        """
        Return a statement for the ID of the session that runs it, and for whether the server runs
        this session of the same role; an empty string if the database has none.
        """
        return ""

    def standby_limits(self, query: Query) -> Refusal:
        """Return what every standby refuses to a role, as a primary reports it."""
        return Refusal()

    def refusal(self, query: Query, error: BaseException) -> Refusal | None:
        """Return why a server refused a statement for being a standby; None for other errors."""
        return None

    def error_code(self, error: BaseException) -> Any:
        """Return the driver's code of an error that Django has wrapped, or None."""
        raise NotImplementedError("subclasses of Dialect must provide an error_code() method")

    def refuses_probe(self, error: BaseException) -> bool:
        """Return whether the server refused a probe, and will refuse it again for some time."""
        return self.error_code(error) in self.permission_errors

    def is_from_server(self, error: BaseException) -> bool:
        """Return whether a server raised an error of connecting, rather than the network."""
        return False

    def is_lost(self, error: BaseException) -> bool:
        """Return whether the connection is lost after an error."""
        return self.error_code(error) in self.connection_lost_errors

    def is_retryable(self, error: BaseException) -> bool:
        """Return whether another server may succeed where this one raised an error."""
        return self.error_code(error) in self.retryable_errors
