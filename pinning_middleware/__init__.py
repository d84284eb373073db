"""
Read from replicas without ever showing a user a state older than what they just wrote.

Names are imported at their first use, so that importing a part of the package (for example its
pytest plugin) does not load Django.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pinning_middleware.api import (
        afollow_keys,
        follow_keys,
        ignore_writes,
        is_pinned,
        no_failover,
        offload,
        offload_this_request,
        pin_keys,
        pin_this_request,
        unpin_this_request,
        use_primary,
        use_replica,
    )
    from pinning_middleware.exceptions import ReplicaWriteError
    from pinning_middleware.not_found import retry_404
    from pinning_middleware.scope_blocks import pinning_scope, propagate_scope

__all__ = [
    "ReplicaWriteError",
    "afollow_keys",
    "follow_keys",
    "ignore_writes",
    "is_pinned",
    "no_failover",
    "offload",
    "offload_this_request",
    "pin_keys",
    "pin_this_request",
    "pinning_scope",
    "propagate_scope",
    "retry_404",
    "unpin_this_request",
    "use_primary",
    "use_replica",
]

_ELSEWHERE = {
    "ReplicaWriteError": "exceptions",
    "propagate_scope": "scope_blocks",
    "retry_404": "not_found",
    "pinning_scope": "scope_blocks",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"{__name__}.{_ELSEWHERE.get(name, 'api')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
