"""
Where a read goes. ``Pool.decide`` is the one place that says so; the router, the managers and
every integration ask it, most of them through ``Pool.db_for_read``, which remembers its answer.

It puts two kinds of knowledge together, and has none of its own: the facts of the scope, and what
is known of servers. A decision names an alias; what counts in the end is the server at the other
end of the connection, which ``Pool.refusal`` judges when the read is about to use it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import PoolSpec, conf
from pinning_middleware.pins import Pin
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.routing.replica_set import Nodes
from pinning_middleware.scopes.overrides import Kind, Open, lifts, open_blocks, override
from pinning_middleware.scopes.scope import Facts, Scope, current_scope, entered_scope
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.probe import probing_allowed, state_of
from pinning_middleware.signals import (
    fell_back_to_primary,
    fell_back_to_replica,
    replica_wait_finished,
)
from pinning_middleware.utils import clock

if TYPE_CHECKING:
    from django.db.models import Model

__all__ = ["Pool", "PrimaryOnly", "Route"]

# An alias, and the reason for it.
Route = tuple[str, str]

# Seconds between two questions of one scope that lasts.
ASK_AGAIN: Final = 1.0
_BY_BLOCK: Final = (Reason.USE_PRIMARY, Reason.USE_REPLICA)
_SAID: Final = (Reason.NOT_CAUGHT_UP, Reason.NO_REPLICA, Reason.PRIMARY_DOWN)


class Pool(Nodes):
    """One primary and its replicas."""

    # Whether what a client has seen moves its position.
    is_monotonic = False
    # The reason for a read that nobody decided.
    otherwise = Reason.EXPLICIT

    def __init__(self, spec: PoolSpec) -> None:
        super().__init__(spec)
        self._by_transaction = self.primary, Reason.TRANSACTION
        # Whether a decision depends on the model; and of which it is known how.
        self.minds_models = bool(conf.primary_models)
        self._verdicts: dict[Any, bool] = {}
        # An answer is not kept where somebody may stand in for the primary at any time.
        self._may_not_keep = conf.primary_down == "stale"
        self._offloads_all = conf.offload is True
        self._by_query = conf.spread_by_query
        # Whether it matters which server answered a read.
        self.minds_servers = self.is_monotonic or self._by_query
        # Whether the settings leave rule 7 as it is.
        self._turns_by_scope = not (self._by_query or self._may_not_keep or self.is_monotonic)
        self._is_plain = self._offloads_all and self._turns_by_scope
        # Each thread's connection to the primary: `connections[alias]` costs more than all the
        # rest of a decision.
        self._thread = threading.local()
        if self.minds_models:
            self.db_for_read = self._db_for_model  # type: ignore[method-assign]

    # The decision

    def db_for_read(self, model: Any = None, **hints: Any) -> str | None:
        """
        Return the alias that the next read uses, ``None`` for one that starts from an instance
        of a database outside this pool. The signature is that of a router, so that Django asks
        the pool itself where there is nothing to translate.
        """
        if hints and (instance := hints.get("instance")) and instance._state.db not in self:
            return None
        scope = entered_scope()
        if scope is None:
            scope = current_scope()
        facts = scope[self.key]
        try:
            connection = self._thread.connection
        except AttributeError:
            connection = self._thread.connection = connections[self.primary]
        if (block := open_blocks()) is not None:
            kept = facts.in_block
            if (
                kept is not None
                and kept[0] is block
                and facts.is_plain
                and kept[1][0] == facts.replica
                and (
                    connection.connection is None
                    or (connection.autocommit and not connection.in_atomic_block)
                )
            ):
                route: Route = kept[1]
                facts.decided = route
                return route[0]
            return self._told(self.decide(model, connection), facts)
        if (
            connection.connection is not None
            and (connection.in_atomic_block or not connection.autocommit)
            and self._in_transaction(connection, scope)
        ):
            facts.decided = self._by_transaction
            return self.primary
        answer: str | None = facts.answer
        if answer is not None:
            return answer
        if self._is_plain and facts.is_plain and scope.is_plain:
            # Rule 7, for what most requests are: nothing speaks against a replica.
            alias = self._replica(facts)
            if alias is not None and facts.meant is None:
                facts.answer = alias
                if facts.writes:
                    # Another thread of this scope has begun to write since.
                    facts.answer = None
                return alias
        return self._told(self._settle(scope, facts), facts)

    def _db_for_model(self, model: Any = None, **hints: Any) -> str | None:
        """Do what ``db_for_read`` does, where some models are read from the primary."""
        is_of_primary = self._verdicts.get(model)
        if is_of_primary is None:
            is_of_primary = self._verdicts[model] = _is_of_primary(model)
        if not is_of_primary:
            return Pool.db_for_read(self, model, **hints)
        if hints and (instance := hints.get("instance")) and instance._state.db not in self:
            return None
        return self._told(self.decide(model), current_scope()[self.key])

    def decide(self, model: Any = None, connection: BaseDatabaseWrapper | None = None) -> Route:
        """
        Return where a read goes and why: the rules of the documentation, the first match wins.
        """
        route = self._decide(connection or connections[self.primary])
        if self.minds_models and route[1] not in _BY_BLOCK and _is_of_primary(model):
            return self.primary, Reason.PRIMARY_MODEL
        return route

    def _decide(self, connection: BaseDatabaseWrapper) -> Route:
        scope = entered_scope() or current_scope()
        facts = scope[self.key]
        block = open_blocks()
        if block is not None and (chosen := override(block, self.primary)) is not None:
            return self._in_block(chosen, facts)
        if (
            connection.connection is not None
            and (connection.in_atomic_block or not connection.autocommit)
            and self._in_transaction(connection, scope)
        ):
            return self.primary, Reason.TRANSACTION
        if facts.answer is not None and block is None:
            return facts.answer, facts.reason
        is_lifted = lifts(block, self.primary)
        route = self._settle(scope, facts, is_lifted)
        if is_lifted and facts.is_plain and self._turns_by_scope and not scope.is_lasting:
            # The same until the scope has news, or leaves its replica.
            facts.in_block = block, route
        return route

    def _in_transaction(self, connection: BaseDatabaseWrapper, scope: Scope | None) -> bool:
        """Return whether the open transaction is one that the code itself asked for."""
        if not connection.in_atomic_block:
            return True
        asked_for = 0
        for block in connection.atomic_blocks:
            asked_for += not block._from_testcase  # type: ignore[attr-defined]
        views = None if scope is None else scope.view_transactions.get(self.primary)
        return asked_for > (views is connection)

    def _in_block(self, block: Open, facts: Facts) -> Route:
        if block.kind is Kind.PRIMARY:
            return self.primary, Reason.USE_PRIMARY
        if block.max_lag is None:
            alias = self._replica(facts)
        else:
            alias = self.within(block.max_lag, facts.replica)
            if alias is not None and self.is_mirror(alias):
                facts.meant, alias = alias, self.primary
        return (alias, Reason.USE_REPLICA) if alias else (self.primary, Reason.NO_REPLICA)

    def _settle(self, scope: Scope, facts: Facts, is_lifted: bool = False) -> Route:
        """Decide by the rules that stay the same for a while, and remember what may be."""
        if facts.writes or facts.by_hand or facts.held:
            writes = dict(facts.writes)
            if self.has_written(scope, facts) or self.is_headless:
                return self._primary(Reason.WROTE if writes else Reason.MANUAL)
            facts.settle(writes)
        if facts.is_locked and not scope.is_lasting:
            return self._primary(Reason.LOCK)
        is_lifted = is_lifted or scope.lifted
        may_keep = not (is_lifted or self._may_not_keep or scope.is_lasting)
        if not is_lifted:
            if scope.from_primary and not facts.is_lifted:
                return self._keep(facts, self._primary(Reason.HTTP_METHOD), may_keep)
            if (scope.is_lasting or not self._offloads_all) and not self._offloads(scope):
                return self._primary(Reason.NOT_OFFLOADED)
        if facts.carried is not None or facts.seen is not None:
            route = self._carried(scope, facts)
            if route is not None:
                is_reached = route[1] == Reason.CAUGHT_UP and not self._by_query
                return self._keep(facts, route, may_keep and is_reached)
        if scope.is_lasting:
            # It has no next scope that would get the next replica.
            now = clock.monotonic()
            if now - facts.turned >= conf.seconds:
                facts.replica, facts.turned = None, now
        alias = self._replica(facts)
        if alias is None:
            return self._primary(Reason.NO_REPLICA)
        return self._keep(facts, (alias, Reason.ROUND_ROBIN), may_keep and not self._by_query)

    def _keep(self, facts: Facts, route: Route, may_keep: bool) -> Route:
        # Where a mirror is meant, what else is read from the primary is to be told from that.
        if may_keep and facts.meant is None:
            facts.answer, facts.reason = route
            if facts.writes and route[0] != self.primary:
                # Another thread of this scope has begun to write since.
                facts.answer = None
        return route

    def _offloads(self, scope: Scope) -> bool:
        """Return whether this scope may read replicas where nothing else speaks."""
        if scope.is_lasting:
            return conf.offload_outside
        if scope.offloads is None:
            if not callable(conf.offload):
                scope.offloads = conf.offload
            elif scope.ask_offload is None:
                # Before authentication, or no request at all.
                return False
            else:
                # What the function itself reads is not to ask it again.
                scope.offloads = False
                scope.offloads = scope.ask_offload()
        return scope.offloads

    def _carried(self, scope: Scope, facts: Facts) -> Route | None:
        """Return who serves under the pins of earlier scopes, ``None``: they are over."""
        is_held, wanted = facts.wanted(clock.now())
        if is_held or (wanted is not None and not self.supports_positions):
            return self._primary(Reason.PINNED)
        if wanted is None:
            return None
        now = clock.monotonic()
        # One question for a request; what lasts longer asks again, but not at every read.
        ask = now - facts.looked > ASK_AGAIN or not facts.looked
        alias = facts.replica if facts.replica and self.has(facts.replica, wanted) else None
        alias = alias or self.holder(wanted, ask)
        wait = conf.wait if scope.wait is None else scope.wait
        if alias is None and ask and wait and probing_allowed(connections[self.primary]):
            alias = self.wait_for(wanted, wait)
            facts.waited = alias, clock.monotonic() - now
        if alias is None:
            if ask:
                facts.looked = now
            return self._primary(Reason.NOT_CAUGHT_UP)
        if self.is_mirror(alias):
            facts.meant, alias = alias, self.primary
        facts.replica = alias
        return alias, Reason.CAUGHT_UP

    def _replica(self, facts: Facts) -> str | None:
        """Return this scope's replica, or the next one's; ``None`` where none is usable."""
        alias = facts.replica
        if alias is None or (self.out and alias in self.out):
            alias = self.turn()
            if alias is not None and self.is_mirror(alias):
                facts.meant, alias = alias, self.primary
            facts.replica = alias
        return alias

    def _primary(self, reason: str) -> Route:
        """Return the primary, or who stands in while it can't be reached."""
        if self.is_headless and (alias := self.stand_in()) is not None:
            return alias, Reason.PRIMARY_DOWN
        return self.primary, reason

    def _told(self, route: Route, facts: Facts) -> str:
        """Say what is worth a signal, now that it is decided; once for a scope."""
        alias, reason = route
        facts.decided = route
        if reason is Reason.ROUND_ROBIN:
            return alias
        if facts.waited is not None:
            (found, seconds), facts.waited = facts.waited, None
            replica_wait_finished.send_robust(
                self.primary,
                replica=found or self.replicas[0],
                seconds=seconds,
                reached=found is not None,
            )
        if reason in _SAID and facts.said != reason:
            facts.said = reason
            signal = fell_back_to_replica if reason == Reason.PRIMARY_DOWN else fell_back_to_primary
            signal.send_robust(self.primary, served=alias, reason=reason)
        return alias

    # What the connection at hand is good for

    def has_written(self, scope: Scope, facts: Facts) -> bool:
        """Return whether what this scope did itself holds it on the primary."""
        if not facts.is_pinned or self.is_headless:
            return False
        if not conf.seconds and not scope.is_lasting:
            # No window at all: the rest of the scope.
            return True
        now = clock.now()
        return facts.wrote_until(conf.seconds, now) > now

    def is_free(self, connection: BaseDatabaseWrapper, scope: Scope | None) -> bool:
        """
        Return whether nothing speaks against reading on a replica's open connection, as far as
        that shows at a glance; ``refusal`` knows more. So it is for most reads.
        """
        facts = None if scope is None else scope.get(self.key)
        if not (facts.is_plain if facts is not None else scope is None or not scope.carried):
            return False
        kept = connection.__dict__.get("_pinning_link")
        if kept is None or kept[0] is not connection.connection:
            return False
        link: ConnectionState = kept[1]
        in_block = open_blocks() is not None
        if (in_block or self._max_lag is not None) and not self.is_only(link, in_block):
            return False
        endpoint, server = link.endpoint, link.server
        is_bad = endpoint.must_reidentify if server is None else server.out_of_rotation
        return not is_bad and endpoint.is_current and not link.was_promoted()

    def refusal(self, connection: BaseDatabaseWrapper, scope: Scope | None) -> str:
        """
        Return why the server of a replica's connection will not serve this scope, empty: it will.
        Asks it where that is not known. Raises what ``look`` raises.
        """
        link = state_of(connection)
        server = link.server
        if (
            server is not None
            and server.out_of_rotation
            and (server.out_of_rotation != Fault.LAG or self.rotation)
        ):
            reason = server.out_of_rotation
            if not self.is_back(connection, server):
                return reason
            link = state_of(connection)
            server = link.server
        block = override(open_blocks(), self.primary)
        max_lag = None if block is None else block.max_lag
        minds_lag = max_lag is not None or self._max_lag is not None
        if minds_lag and not self.is_only(link, max_lag is not None):
            if why := self.lags(connection, max_lag):
                return why
            link = state_of(connection)
            server = link.server
        is_promoted = link.was_promoted()
        if is_promoted or (server is None and link.endpoint.must_reidentify):
            seen = self.look_at(connection)
            link.promotion_seen = is_promoted
            if seen is not None and seen.server.out_of_rotation not in ("", Fault.LAG):
                return seen.server.out_of_rotation
        if scope is None or self.is_headless or connection.alias not in conf.guarded:
            # Of the older interface's replicas `using` has the last word.
            return ""
        facts = scope.get(self.key)
        if facts is None:
            if not scope.carried:
                return ""
            facts = scope[self.key]
        if facts.carried is None and facts.seen is None:
            return ""
        if block is not None:
            return ""
        is_held, wanted = facts.wanted(clock.now())
        if is_held or (wanted is not None and not self.supports_positions):
            return Reason.PINNED
        if wanted is None or self.has(connection.alias, wanted):
            return ""
        return "" if self.asked_has(connection.alias, wanted) else Reason.NOT_CAUGHT_UP

    def note_served(self, facts: Facts, alias: str) -> None:
        """Note who answered a read, where that is worth knowing."""

    # What a scope means for this pool

    def is_pinned(self, scope: Scope) -> bool:
        """Return whether this scope's reads belong to the primary, or to who has caught up."""
        facts = scope[self.key]
        now = clock.now()
        if facts.carried is not None and facts.carried.until > now:
            return True
        if self.has_written(scope, facts):
            return True
        is_by_method = scope.from_primary and not facts.is_lifted
        return not scope.is_lasting and (facts.is_locked or is_by_method)

    def seen(self, facts: Facts, now: float) -> Pin | None:
        """Return the pin of what a scope has read: none where only writes pin."""
        return None

    # Which connection is whose, who is in

    def adopt(self, connection: BaseDatabaseWrapper) -> None:
        """Take this for the thread's connection to the primary."""
        self._thread.connection = connection


class PrimaryOnly(Pool):
    """A pool without replicas, or of a site that switched them off."""

    def __init__(self, spec: PoolSpec) -> None:
        super().__init__(spec)
        self.otherwise = Reason.NO_REPLICA if conf.enabled else Reason.DISABLED

    def db_for_read(self, model: Any = None, **hints: Any) -> str | None:
        instance = hints.get("instance")
        return self.primary if instance is None or instance._state.db in self else None

    def decide(self, model: Any = None, connection: BaseDatabaseWrapper | None = None) -> Route:
        return self.primary, self.otherwise


def _is_of_primary(model: type[Model] | None) -> bool:
    if model is None:
        return False
    known = {model, model._meta.concrete_model}
    labels = {label for one in known if one for label in (one._meta.app_label, one._meta.label)}
    return not conf.primary_models.isdisjoint(map(str.lower, labels))
