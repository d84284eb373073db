"""Passes a decision of the policy from Django's router to the cursor that follows it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

from pinning_middleware.reasons import Reason
from pinning_middleware.routing.dry_run import DryRunPool, redirect_to_primary
from pinning_middleware.routing.policy import Decision, decide
from pinning_middleware.routing.pool import Pool
from pinning_middleware.scopes.scope import Scope, current_scope
from pinning_middleware.servers.budget import read_budget
from pinning_middleware.signals import fell_back_to_primary, fell_back_to_replica

_FALLBACKS: Final = (Reason.NOT_CAUGHT_UP, Reason.NO_REPLICA, Reason.PRIMARY_DOWN)

# The decision for the read that follows, until a cursor is opened for it.
_pending: ContextVar[Decision | None] = ContextVar("pinning_decision", default=None)


def route(pool: Pool, model: object = None) -> str:
    """Decide where the next read of a pool goes and return the alias for Django."""
    # What the end of the last request spent was not for this read.
    read_budget.renew()
    scope = current_scope()
    decision = decide(pool, scope, model)
    if isinstance(pool, DryRunPool):
        decision = redirect_to_primary(pool, scope, decision, model)
    elif pool.has_replicas and decision.reason in _FALLBACKS:
        send_fallback(pool, scope, decision.alias, decision.reason)
    _pending.set(decision)
    return decision.alias


def forget_decision() -> None:
    """Forget the last decision, because the next read does not follow it."""
    _pending.set(None)


def take_decision(alias: str) -> Decision | None:
    """
    Return the decision that a new cursor of this alias follows; None if the code named the alias.

    Django asks the router and opens the cursor in separate calls, so that a decision which no read
    followed is taken by the next raw read of the same alias, even if the code named that.
    """
    decision = _pending.get()
    if decision is None:
        return None
    _pending.set(None)
    return decision if decision.alias == alias else None


def send_fallback(pool: Pool, scope: Scope, served: str, reason: Reason) -> None:
    """Send the signal for a read by another role than intended, once for each scope and reason."""
    if (pool.key, reason) in scope.signalled:
        return
    scope.signalled |= {(pool.key, reason)}
    signal = fell_back_to_replica if reason is Reason.PRIMARY_DOWN else fell_back_to_primary
    signal.send_robust(pool.primary, served=served, reason=reason)
