"""
The blocks that are open: ``use_primary``, ``use_replica``, ``offload``, ``no_failover`` and
``ignore_writes``. They live in a context variable of their own, as a chain of values.
"""

from __future__ import annotations

from contextvars import ContextVar
from enum import Enum
from typing import NamedTuple

__all__ = [
    "Kind",
    "Open",
    "close",
    "enter_blocks",
    "failover_suppressed",
    "ignores_writes",
    "lifts",
    "open_block",
    "open_blocks",
    "override",
]


class Kind(Enum):
    PRIMARY = "use_primary"
    REPLICA = "use_replica"
    OFFLOAD = "offload"
    NO_FAILOVER = "no_failover"
    IGNORE = "ignore_writes"


class Open(NamedTuple):
    """An open block, who opened it, and the block around it."""

    kind: Kind
    owner: object
    using: str | None
    max_lag: float | None
    outer: Open | None


_blocks: ContextVar[Open | None] = ContextVar("pinning_blocks", default=None)

open_blocks = _blocks.get
# Enter a whole chain, as another context had it.
enter_blocks = _blocks.set


def open_block(
    kind: Kind, owner: object, using: str | None = None, max_lag: float | None = None
) -> None:
    _blocks.set(Open(kind, owner, using, max_lag, _blocks.get()))


def close(owner: object) -> None:
    """
    Close the innermost block of this owner, and no other; nothing where the context has moved on,
    as for a generator that is collected in another request.
    """
    inside: list[Open] = []
    block = _blocks.get()
    while block is not None and block.owner is not owner:
        inside.append(block)
        block = block.outer
    if block is None:
        return
    outer = block.outer
    for other in reversed(inside):
        outer = other._replace(outer=outer)
    _blocks.set(outer)


def override(block: Open | None, primary: str) -> Open | None:
    """Return the innermost ``use_primary`` or ``use_replica`` that speaks of this pool."""
    while block is not None:
        if block.kind in (Kind.PRIMARY, Kind.REPLICA) and block.using in (None, primary):
            return block
        block = block.outer
    return None


def lifts(block: Open | None, primary: str) -> bool:
    """Return whether an open ``offload`` speaks of this pool."""
    while block is not None:
        if block.kind is Kind.OFFLOAD and block.using in (None, primary):
            return True
        block = block.outer
    return False


def failover_suppressed() -> bool:
    """Return whether aliases name the very nodes that are talked to."""
    return _has(Kind.NO_FAILOVER)


def ignores_writes() -> bool:
    return _has(Kind.IGNORE)


def _has(kind: Kind) -> bool:
    block = _blocks.get()
    while block is not None:
        if block.kind is kind:
            return True
        block = block.outer
    return False
