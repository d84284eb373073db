"""
The context managers that are active: ``use_primary``, ``use_replica``, ``offload``,
``no_failover``, ``ignore_writes`` and ``retry_404``, and the saving of an instance.

They form a chain of immutable values in a context variable of its own.
"""

from __future__ import annotations

from contextvars import ContextVar
from enum import Enum
from typing import NamedTuple

from pinning_middleware.scopes import threads


class OverrideKind(Enum):
    """What an override does; the value is the name of the public function."""

    PRIMARY = "use_primary"
    REPLICA = "use_replica"
    OFFLOAD = "offload"
    NO_FAILOVER = "no_failover"
    IGNORE_WRITES = "ignore_writes"
    RETRY_404 = "retry_404"
    # Model.save(): what it reads is part of the write.
    SAVING = "save"


_ROUTING = (OverrideKind.PRIMARY, OverrideKind.REPLICA, OverrideKind.RETRY_404)


class Override(NamedTuple):
    """
    An active override.

    ``owner`` is the object that pushed it, ``using`` the alias of the primary it applies to (None:
    every pool), ``max_lag`` in seconds (None: no limit), ``outer`` the override around it,
    ``group`` that of the replicas to read from (None: those without groups).
    """

    kind: OverrideKind
    owner: object
    using: str | None
    max_lag: float | None
    outer: Override | None
    group: str | None = None


class Effects(NamedTuple):
    """
    What the active overrides mean for one pool. ``routing``: the innermost ``use_primary``,
    ``use_replica`` or ``retry_404``.
    """

    routing: Override | None = None
    is_saving: bool = False
    is_offloaded: bool = False
    no_failover: bool = False


_NO_EFFECTS = Effects()

_overrides: ContextVar[Override | None] = ContextVar("pinning_overrides", default=None)

# Returns the innermost override that is active, with those around it.
current_overrides = threads.getter(_overrides)
# Replaces the whole chain, for example by that of another context.
set_overrides = _overrides.set


def push(
    kind: OverrideKind,
    owner: object,
    using: str | None = None,
    max_lag: float | None = None,
    group: str | None = None,
) -> None:
    """Activate an override inside those that are active."""
    _overrides.set(Override(kind, owner, using, max_lag, current_overrides(), group))


def pop(owner: object) -> None:
    """
    Deactivate the innermost override of this owner, and any that were left active inside it.

    Do nothing if this owner has none, for example when a generator is closed in another context.
    """
    override = current_overrides()
    while override is not None:
        if override.owner is owner:
            _overrides.set(override.outer)
            return
        override = override.outer


def effects_on(primary: str) -> Effects:
    """Return what the active overrides mean for the pool of this primary."""
    override = current_overrides()
    if override is None:
        return _NO_EFFECTS
    routing, kinds = None, set()
    while override is not None:
        if override.using is None or override.using == primary:
            kinds.add(override.kind)
            if routing is None and override.kind in _ROUTING:
                routing = override
        override = override.outer
    return Effects(
        routing,
        is_saving=OverrideKind.SAVING in kinds,
        is_offloaded=OverrideKind.OFFLOAD in kinds,
        no_failover=OverrideKind.NO_FAILOVER in kinds,
    )


def writes_ignored() -> bool:
    """Return whether ``ignore_writes`` is active."""
    override = current_overrides()
    while override is not None:
        if override.kind is OverrideKind.IGNORE_WRITES:
            return True
        override = override.outer
    return False
