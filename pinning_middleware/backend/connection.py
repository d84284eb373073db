"""
The mixin that every connection of Django gets, over the site's own ``DatabaseWrapper`` class.

It bounds connecting, defers the error of a failed connection until a statement is run (which may be
retried on another server), and reports the end of transactions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.db import Error, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from pinning_middleware.backend.async_connections import InstrumentedAsyncConnection
from pinning_middleware.backend.call import OutOfRotation, UnopenedCursor
from pinning_middleware.backend.execute import execute_wrapper
from pinning_middleware.backend.former_primary import check_before_transaction
from pinning_middleware.backend.session_setup import set_up_session, undo_session_setup
from pinning_middleware.backend.writes import record_session_end, record_transaction_end
from pinning_middleware.conf import conf
from pinning_middleware.routing.policy import Decision, own_pin_reason, to_inherited_pin
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.route import take_decision
from pinning_middleware.scopes.overrides import effects_on
from pinning_middleware.scopes.scope import Scope, current_scope
from pinning_middleware.servers.connect import BoundedConnect
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.probe import CONNECTION_ERRORS, failover_disabled, state_of
from pinning_middleware.utils import clock

if TYPE_CHECKING:
    from pinning_middleware.pins import Points


class InstrumentedConnection(BoundedConnect):
    """Mixed into the connection class of each ENGINE; see ``instrumented_class()``."""

    # The scopes with a write in the transaction that is open.
    uncommitted_scopes: frozenset[Scope] = frozenset()
    # BEGIN was sent as a statement of its own.
    in_raw_transaction = False
    # Django is setting up the session of a new connection.
    is_connecting = False
    # What the server was known to have replayed when the transaction began.
    snapshot: Points | None = None
    # The driver's cursor that was opened last, and the decision behind it.
    last_opened: tuple[Any, Decision | None] = (None, None)
    # The code has changed session state of the primary, which keeps its scope there.
    has_modified_session = False
    # What PINNING_SESSION_SETUP was last called for: the driver's connection and the scope.
    session_set_up_for: tuple[Any, Any] = (None, None)

    def connect(self) -> None:
        """Open the connection."""
        self.in_raw_transaction = False
        self.is_connecting = True
        # Django wraps the driver's errors outside of connect().
        driver: Any = self.Database
        unreachable = (*CONNECTION_ERRORS, driver.OperationalError, driver.InterfaceError)
        try:
            super().connect()
        except (Error, driver.Error) as error:
            if self.alias not in conf.primary_by_replica:
                raise
            # If only setting up the session failed, the read would run on the connection as it is.
            # A standby refuses that for a role that is `serializable`, for example.
            self.close()
            if isinstance(error, unreachable):
                raise
            raise OperationalError(*error.args) from error.__cause__ or error
        finally:
            self.is_connecting = False
        if dialect_for(self) is not None and self.alias in pools().by_connection:
            state = state_of(self)
            # What receivers of connection_created set applies to every connection.
            state.session_modified = state.session_modified_at_checkout

    def _cursor(self, name: str | None = None) -> Any:
        decision = take_decision(self.alias)
        pool = pools().by_connection.get(self.alias)
        if pool is None:
            return super()._cursor(name)
        cursor: Any
        if effects_on(pool.primary).no_failover:
            cursor = super()._cursor(name)
        elif self.alias != pool.primary and pool.is_mirror(self.alias):
            # Only the primary's own connection sees the rows of a test's transaction.
            primary: Any = connections[pool.primary]
            cursor = primary._cursor(name)
            cursor.pinning_alias = self.alias
        else:
            cursor = self._cursor_or_error(pool, name)
        cursor.pinning_decision = decision
        # A tool that wraps cursors makes another wrapper around the driver's cursor.
        cursor.db.last_opened = cursor.cursor, decision
        return cursor

    def create_cursor(self, name: str | None = None) -> Any:
        """Return a cursor of the driver, on the server if it has a name."""
        cursor = super().create_cursor(name)
        if name is not None and self.alias in pools().by_connection:
            state_of(self).named_cursors.add(cursor)
        return cursor

    def _cursor_or_error(self, pool: Pool, name: str | None) -> Any:
        # A queryset's iterator() reads the settings of the alias that it was routed to, which
        # differs from this one after a failover, and for a test mirror.
        if self.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
            name = None
        try:
            if self.connection is None:
                self._check_reachable(pool)
            return super()._cursor(name)
        except CONNECTION_ERRORS as error:
            if not self._may_fail_over(pool):
                raise
            return self._prepare_cursor(UnopenedCursor(error, name))

    def _check_reachable(self, pool: Pool) -> None:
        """Raise OperationalError if the alias is known to be unreachable and may be retried."""
        endpoint = pool.endpoint if self.alias == pool.primary else pool.endpoints[self.alias]
        if endpoint.is_down and self._may_fail_over(pool):
            raise OutOfRotation(f"{self.alias} is out of rotation: {endpoint.error}")

    def _may_fail_over(self, pool: Pool) -> bool:
        """Return whether a statement may be run elsewhere if this connection cannot be opened."""
        if self.in_atomic_block or failover_disabled.get():
            return False
        return self.alias != pool.primary or pool.can_replace_primary

    # The end of transactions

    def set_autocommit(self, autocommit: bool, *args: Any, **kwargs: Any) -> None:
        """Begin or end a transaction as Django's ``atomic()`` does."""
        if not autocommit:
            self._leave_former_primary()
            self._take_snapshot()
            # What is set inside the transaction would be rolled back with it.
            set_up_session(self)
        super().set_autocommit(autocommit, *args, **kwargs)
        # Some backends begin the transaction by a statement.
        self.in_raw_transaction = False
        if autocommit:
            record_transaction_end(self)

    def _leave_former_primary(self) -> None:
        """
        Connect anew if the primary's alias resolves to another server by now.

        Raise OperationalError if it still resolves to a former primary.
        """
        pool = pools().by_connection.get(self.alias)
        if pool is None or self.connection is None or failover_disabled.get():
            return
        if effects_on(pool.primary).no_failover:
            return
        check_before_transaction(pool, self, current_scope())

    def _take_snapshot(self) -> None:
        """Record what a replica has replayed, if the scope's pins depend on it."""
        pool = pools().by_connection.get(self.alias)
        if pool is None or self.alias == pool.primary or not pool.supports_positions:
            return
        scope = current_scope()
        state = scope.state(pool.key)
        if state.is_pinned and own_pin_reason(scope, state) is None:
            state = to_inherited_pin(pool, scope, state)
        wanted = state.required(clock.now()).position
        if wanted is not None and not failover_disabled.get():
            pool.replica_set.probe_caught_up(self.alias, wanted, always=True)
        server = state_of(self).server if self.connection is not None else None
        self.snapshot = None if server is None else server.position

    def _commit(self) -> None:
        try:
            super()._commit()
        finally:
            record_transaction_end(self)

    def _rollback(self) -> None:
        try:
            super()._rollback()
        finally:
            undo_session_setup(self)
            record_transaction_end(self)

    def _savepoint_rollback(self, sid: str) -> None:
        super()._savepoint_rollback(sid)
        undo_session_setup(self)

    def _close(self) -> None:
        try:
            super()._close()
        finally:
            self.in_raw_transaction = False
            record_transaction_end(self)
            undo_session_setup(self)
            if self.has_modified_session:
                self.has_modified_session = False
                record_session_end(self)


@lru_cache
def instrumented_class(base: Any) -> Any:
    """Return the connection class of an ENGINE with the mixin."""
    if issubclass(base, InstrumentedConnection):
        return base
    return type(base.__name__, (InstrumentedConnection, base), {"__module__": base.__module__})


def wrap_create_connection(original: Any) -> Any:
    """Wrap ``ConnectionHandler.create_connection``."""

    def create_connection(self: Any, alias: str) -> Any:
        return instrument(original(self, alias))

    return create_connection


def instrument(connection: Any) -> Any:
    """Give a connection the mixin and the execute wrapper, and return it. Idempotent."""
    if not getattr(connection, "is_dedicated", False):
        kind: Any = type(connection)
        connection.__class__ = instrumented_class(kind)
        if execute_wrapper not in connection.execute_wrappers:
            # connection.execute_wrapper() appends and pops; this one stays, outermost.
            connection.execute_wrappers.insert(0, execute_wrapper)
    return connection


def _on_connection_created(*, connection: Any, **kwargs: Any) -> None:
    # A connection that was made without the handler, by connection.copy() for example.
    if isinstance(connection, BaseDatabaseWrapper):
        instrument(connection)
    elif isinstance(connection, InstrumentedAsyncConnection):
        return
    elif connection.alias in pools().by_connection:
        raise ImproperlyConfigured(
            f"The connection {connection.alias!r} is a {type(connection).__qualname__}, which is "
            "not a BaseDatabaseWrapper of Django, so its writes cannot be detected. Use another "
            "ENGINE for the aliases in PINNING_REPLICAS."
        )


def install() -> None:
    """Instrument the existing connections, and those made without the handler. Idempotent."""
    connection_created.connect(_on_connection_created, dispatch_uid="pinning_middleware.connection")
    for connection in connections.all(initialized_only=True):
        instrument(connection)
