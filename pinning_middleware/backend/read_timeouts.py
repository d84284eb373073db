"""
Reads that the driver gave up after ``read_timeout`` of OPTIONS (MySQL and MariaDB).

The driver reports them like a lost connection (error 2013), whether the server is frozen or the
statement is slow. A probe over a new connection distinguishes the two.
"""

from __future__ import annotations

from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf
from pinning_middleware.reasons import Fault
from pinning_middleware.servers.blocked_reads import PROBE_TIMEOUT, ProbeOutcome, probe_afresh
from pinning_middleware.servers.budget import read_budget
from pinning_middleware.servers.connect import CONNECT_TIMEOUT
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.probe import endpoint_for, state_of
from pinning_middleware.servers.registry import registry


def has_timed_out(connection: BaseDatabaseWrapper, error: Exception, seconds: float) -> bool:
    """Return whether a read that failed after ``seconds`` exceeded ``read_timeout``."""
    limit = connection.settings_dict["OPTIONS"].get("read_timeout")
    dialect = dialect_for(connection)
    if not limit or dialect is None or seconds < float(limit):
        return False
    return dialect.error_code(error) in dialect.connection_lost_errors


def answers_probe(connection: BaseDatabaseWrapper, error: Exception, ran_for: float) -> bool:
    """
    Return whether the server of a connection answers a probe over a new connection.

    Otherwise it is taken out of rotation, and the ``ran_for`` seconds of the read are subtracted
    from its budget. If another server behind the alias answers, no status changes.
    """
    endpoint, state = endpoint_for(connection), state_of(connection)
    seconds = min(CONNECT_TIMEOUT, max(read_budget.left - ran_for, PROBE_TIMEOUT))
    with read_budget.spending():
        outcome, server = probe_afresh(state, seconds), state.server
    if outcome is not ProbeOutcome.ANSWERED:
        read_budget.spend(ran_for)
    if outcome is ProbeOutcome.UNANSWERED:
        if server is not None:
            registry.set_status(server, Fault.UNRESPONSIVE, conf.retry_after, error)
        if not endpoint.is_down and (server is None or len(endpoint.recent_servers) < 2):
            registry.mark_down(endpoint, Fault.UNRESPONSIVE, conf.retry_after, error)
    return outcome is ProbeOutcome.ANSWERED
