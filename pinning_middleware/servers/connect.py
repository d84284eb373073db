"""
Connect within a bounded time, whatever the driver's own timeout is, and retry an attempt that fails
at once.

A driver may block for longer than its timeout: libpq and psycopg apply it to each host and address,
after the names were resolved. So an attempt runs in a thread of its own, and is abandoned.
https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-CONNECT-TIMEOUT
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from django.db import OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import load_backend

from pinning_middleware.conf import conf
from pinning_middleware.servers import watchdog
from pinning_middleware.servers.budget import BudgetExhausted, read_budget
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.liveness import (
    ServerUnresponsive,
    driver_connection,
    mark_unresponsive,
    probe_deadline,
)
from pinning_middleware.servers.probe import CONNECTION_ERRORS, endpoint_for, probing, state_of
from pinning_middleware.servers.psycopg_pool import (
    apply_pool_timeouts,
    get_live_connection,
    has_connection_pool,
)
from pinning_middleware.servers.registry import RECENT_FOR, Endpoint, registry
from pinning_middleware.utils.race import first_result

if TYPE_CHECKING:
    # The class that the mixin is combined with, whose attributes differ by ENGINE.
    from typing import TypeAlias

    Base: TypeAlias = Any
else:
    Base = object

# Maximum seconds to connect.
CONNECT_TIMEOUT: Final = 1.0
# Seconds after which the driver gives up an abandoned attempt, unless OPTIONS has a value. Drivers
# wait for minutes by default; libpq takes no less.
DRIVER_TIMEOUT: Final = 2
# Seconds within which an attempt must fail to be retried once.
RETRY_IF_FAILED_WITHIN: Final = 0.5
# Seconds until another attempt, beside one that has not been answered; the second applies while one
# may not be answered and another is.
ATTEMPT_INTERVAL, HUNG_ATTEMPT_INTERVAL = 0.5, 0.05
MAX_ATTEMPTS: Final = 8

# Aliases that a test has made unreachable.
unreachable_in_tests: set[str] = set()


class ConnectTimeout(OperationalError):
    """No attempt to connect ended in time."""


class BoundedConnect(Base):  # type: ignore[misc]
    """
    A mixin of connection classes that limits the time for connecting, and for getting a connection
    of Django's connection pool, and retries an attempt that fails immediately.

    Applies if another server could serve, or to a probe. Otherwise the driver's behaviour is kept.
    """

    # A connection for the package's own use; see dedicated_connection().
    is_dedicated = False
    # A read waits for it.
    is_for_read = True
    # The deadline for setting up a new connection of a driver whose waits cannot be watched.
    _guard: watchdog.Guard | None = None

    def get_connection_params(self) -> dict[str, Any]:
        """Return the driver's parameters, with a timeout unless OPTIONS has one."""
        params: dict[str, Any] = super().get_connection_params()
        dialect = dialect_for(self)
        # The parameters of a connection pool apply to all its connections, even if a probe creates
        # it.
        is_probe = probing.get() and not has_connection_pool(self)
        if dialect is not None and (is_probe or _always_needs_timeout(self)):
            params.setdefault(dialect.connect_timeout, DRIVER_TIMEOUT)
        return params

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """Return a new connection of the driver."""
        if self.alias in unreachable_in_tests:
            raise OperationalError(
                f"{self.alias} is made unreachable by pinning_middleware.testing"
            )
        get_new_connection = super().get_new_connection
        if not _needs_timeout(self):
            return get_new_connection(conn_params)
        if has_connection_pool(self):
            apply_pool_timeouts(self, _always_needs_timeout(self), CONNECT_TIMEOUT)
            raw = get_live_connection(
                self,
                functools.partial(get_new_connection, conn_params),
                functools.partial(_check_reachable, self.alias),
            )
        else:
            with read_budget.spending():
                raw = _connect_in_time(self, get_new_connection, conn_params)
        # Django's init_connection_state() waits for the server, too.
        state = state_of(self, raw)
        if not state.waits_are_watched:
            until = time.monotonic() + _set_up_time(self)
            self._guard = watchdog.guard(driver_connection(raw), until)
        return raw

    def is_usable(self) -> bool:
        """Return whether the server answers, within the deadline of a probe if there is another."""
        raw, usable = self.connection, super().is_usable
        if raw is None or not _needs_timeout(self):
            return usable()  # type: ignore[no-any-return]
        state = state_of(self)
        if state.waits_are_watched or state.deadline is not None:
            return usable()  # type: ignore[no-any-return]
        try:
            with read_budget.spending(), probe_deadline(raw, state):
                return usable()  # type: ignore[no-any-return]
        except ServerUnresponsive:
            if not self.is_dedicated:
                mark_unresponsive(state)
            return False

    def close_if_unusable_or_obsolete(self) -> None:
        """Close the connection at the end of a request if it cannot be used any more."""
        try:
            super().close_if_unusable_or_obsolete()
        except OperationalError:
            # The server does not answer. Django expects only errors of the driver here.
            self.close()

    def _connect_guarded(self) -> None:
        try:
            super().connect()
        finally:
            guard, self._guard = self._guard, None
            if guard is not None and guard.end():
                self.close()
                raise ConnectTimeout(f"{self.alias} did not set up a connection in time")

    def connect(self) -> None:
        """Connect, and retry once if the attempt failed at once."""
        # A pool may hand out another connection of the driver than the last one.
        self.__dict__.pop("pinning_state", None)
        began = time.monotonic()
        # Django wraps the driver's errors outside of connect().
        of_driver = (self.Database.OperationalError, self.Database.InterfaceError)
        try:
            self._connect_guarded()
        except (*CONNECTION_ERRORS, *of_driver) as error:
            if isinstance(error, ConnectTimeout):
                raise
            if time.monotonic() - began >= RETRY_IF_FAILED_WITHIN or not _needs_timeout(self):
                raise
            if endpoint_for(self).is_down:
                # Its monitor tries again in a moment.
                raise
            self.close()
            self._connect_guarded()


def _needs_timeout(connection: Any) -> bool:
    """Return whether to limit the time: another server could serve, or this is a probe."""
    if dialect_for(connection) is None:
        return False
    return probing.get() or _always_needs_timeout(connection)


def _always_needs_timeout(connection: Any) -> bool:
    alias = connection.alias
    may_substitute = conf.primary_down == "stale" and alias in conf.replicas
    return bool(alias in conf.primary_by_replica or connection.is_dedicated or may_substitute)


def _connect_in_time(
    connection: Any, connect: Callable[[dict[str, Any]], Any], params: dict[str, Any]
) -> Any:
    """
    Return a new connection of the driver.

    Raise ConnectTimeout if there is none within CONNECT_TIMEOUT, or another caller finds meanwhile
    that the endpoint is down; BudgetExhausted if a read has less time left.
    """
    seconds = CONNECT_TIMEOUT
    # The primary comes last: nothing is left to save time for.
    if connection.is_for_read and (
        connection.is_dedicated or connection.alias in conf.primary_by_replica
    ):
        seconds = min(read_budget.left, CONNECT_TIMEOUT)
    endpoint = endpoint_for(connection)
    was_down = endpoint.is_down
    began = time.monotonic()
    has_hung = began - endpoint.hung_at < RECENT_FOR
    # A server that is only busy must not get more attempts than necessary.
    has_several = _is_list(params) or len(endpoint.servers) > 1
    maximum = MAX_ATTEMPTS if has_hung and has_several else 2
    attempts = list(_rotations(params, endpoint, maximum))
    interval = HUNG_ATTEMPT_INTERVAL if has_hung else ATTEMPT_INTERVAL

    def attempt(number: int) -> tuple[int, Any]:
        return number, connect(attempts[number])

    try:
        number, raw = first_result(
            (functools.partial(attempt, number) for number in range(len(attempts))),
            seconds=seconds,
            interval=interval,
            discard=lambda late: late[1].close(),
            give_up=lambda: endpoint.is_down and not was_down,
        )
    except TimeoutError as error:
        is_down = seconds == CONNECT_TIMEOUT or endpoint.is_down
        kind = ConnectTimeout if is_down else BudgetExhausted
        raise kind(f"{connection.alias} did not accept a connection in time") from error
    if number and time.monotonic() - began >= ATTEMPT_INTERVAL:
        # The attempts before this one have not been answered for longer than a busy server takes.
        endpoint.hung_at = time.monotonic()
        overdue = endpoint.hung_at - began - ATTEMPT_INTERVAL
        late = itertools.takewhile(lambda n: n * interval <= overdue, range(number))
        hung = [_hosts(attempts[each])[0] for each in late if _is_list(attempts[each])]
        endpoint.unresponsive_hosts.update(hung)
        if hung:
            registry.request_work(endpoint)
    return raw


def _set_up_time(connection: Any) -> float:
    """Return how long setting up a new connection may take (seconds)."""
    if connection.is_dedicated or connection.alias not in conf.primary_by_replica:
        return CONNECT_TIMEOUT
    return max(min(CONNECT_TIMEOUT, read_budget.left), ATTEMPT_INTERVAL)


def _rotations(params: dict[str, Any], endpoint: Endpoint, number: int) -> Iterator[dict[str, Any]]:
    """
    Yield the parameters of several attempts: with a list of hosts, each begins with another one,
    and those that do not answer are left out.
    """
    if not _is_list(params):
        yield from (dict(params) for _ in range(number))
        return
    hosts = _hosts(params)
    hosts = [host for host in hosts if host not in endpoint.unresponsive_hosts] or hosts
    more: dict[str, Any] = {}
    if params.get("load_balance_hosts") == "random":
        random.shuffle(hosts)
        more["load_balance_hosts"] = "disable"
    for first in range(max(number, len(hosts))):
        rotated = [hosts[(first + offset) % len(hosts)] for offset in range(len(hosts))]
        host, port = (",".join(each) for each in zip(*rotated, strict=True))
        yield {**params, **more, "host": host, "port": port}


def _is_list(params: dict[str, Any]) -> bool:
    return "," in str(params.get("host", "")) and not params.get("hostaddr")


def _hosts(params: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the hosts of a list and their ports, as libpq pairs them."""
    hosts = str(params["host"]).split(",")
    ports = str(params.get("port") or "").split(",")
    return list(zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=False))


def _check_reachable(alias: str) -> None:
    with contextlib.closing(dedicated_connection(alias, for_read=True)) as connection:
        connection.ensure_connection()


@functools.lru_cache
def _bounded_class(base: Any) -> Any:
    """Return the connection class of an ENGINE with the mixin."""
    return type(base.__name__, (BoundedConnect, base), {"__module__": base.__module__})


def dedicated_connection(
    alias: str, host: tuple[str, str] | None = None, *, for_read: bool = False
) -> BaseDatabaseWrapper:
    """
    Return a new connection for the package's own use, not from a connection pool, for any thread;
    to one host and port of the alias's list if ``host`` is given. ``for_read``: a read waits for
    it, so that connecting takes no longer than what is left of its budget.
    """
    settings = connections.settings[alias]
    if host is not None:
        settings = {**settings, "HOST": host[0], "PORT": host[1]}
    options = {name: value for name, value in settings["OPTIONS"].items() if name != "pool"}
    backend: Any = load_backend(settings["ENGINE"])
    connection = _bounded_class(backend.DatabaseWrapper)(
        {**settings, "OPTIONS": options, "AUTOCOMMIT": True}, alias
    )
    connection.is_dedicated, connection.is_for_read = True, for_read
    connection.inc_thread_sharing()
    return connection  # type: ignore[no-any-return]
