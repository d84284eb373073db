"""
The context managers that are active: ``use_primary``, ``use_replica``, ``offload``,
``no_failover`` and ``ignore_writes``, and the saving of an instance.

They form a chain of immutable values in a context variable of its own.
"""

from __future__ import annotations

from contextvars import ContextVar
from enum import Enum
from typing import NamedTuple

from pinning_middleware.scopes.threads import clear_inherited, not_inherited

__all__ = [
    "Kind",
    "Override",
    "current_overrides",
    "failover_suppressed",
    "innermost_override",
    "is_saving",
    "offload_applies",
    "pop",
    "push",
    "set_overrides",
    "writes_ignored",
]


class Kind(Enum):
    """What an override does; the value is the name of the public function."""

    PRIMARY = "use_primary"
    REPLICA = "use_replica"
    OFFLOAD = "offload"
    NO_FAILOVER = "no_failover"
    IGNORE_WRITES = "ignore_writes"
    RETRY_404 = "retry_404"
    # Model.save(): what it reads is part of the write.
    SAVING = "save"


_ROUTING = (Kind.PRIMARY, Kind.REPLICA, Kind.RETRY_404)


class Override(NamedTuple):
    """
    An active override.

    ``owner`` is the object that pushed it, ``using`` the alias of the primary it applies to (None:
    every pool), ``max_lag`` in seconds (None: no limit), ``outer`` the override around it,
    ``group`` that of the replicas to read from (None: those without groups).
    """

    kind: Kind
    owner: object
    using: str | None
    max_lag: float | None
    outer: Override | None
    group: str | None = None

    def applies_to(self, primary: str) -> bool:
        """Return whether the override applies to the pool of this primary."""
        return self.using is None or self.using == primary


_overrides: ContextVar[Override | None] = ContextVar("pinning_overrides", default=None)
not_inherited(_overrides)

# Replace the whole chain, for example by that of another context.
set_overrides = _overrides.set


def current_overrides() -> Override | None:
    """Return the innermost override that is active, with those around it."""
    clear_inherited()
    return _overrides.get()


def push(
    kind: Kind,
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

    Does nothing if the context has moved on, as for a generator that is collected later.
    """
    override = current_overrides()
    while override is not None:
        if override.owner is owner:
            _overrides.set(override.outer)
            return
        override = override.outer


def innermost_override(override: Override | None, primary: str) -> Override | None:
    """
    Return the innermost ``use_primary``, ``use_replica`` or repetition of a view for this
    primary's pool.
    """
    while override is not None:
        if override.kind in _ROUTING and override.applies_to(primary):
            return override
        override = override.outer
    return None


def offload_applies(override: Override | None, primary: str) -> bool:
    """Return whether ``offload`` is active for this primary's pool."""
    return _find(override, Kind.OFFLOAD, primary)


def is_saving(override: Override | None, primary: str) -> bool:
    """Return whether an instance is being saved to this primary."""
    return _find(override, Kind.SAVING, primary)


def failover_suppressed() -> bool:
    """Return whether ``no_failover`` is active."""
    return _find(current_overrides(), Kind.NO_FAILOVER)


def writes_ignored() -> bool:
    """Return whether ``ignore_writes`` is active."""
    return _find(current_overrides(), Kind.IGNORE_WRITES)


def _find(override: Override | None, kind: Kind, primary: str | None = None) -> bool:
    while override is not None:
        if override.kind is kind and (primary is None or override.applies_to(primary)):
            return True
        override = override.outer
    return False
