"""
Read from replicas without ever showing a user a state older than what they just wrote.

The names are imported at their first use, so that whoever needs one small part of the package (a
tool of pytest, say) does not load Django for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exceptions import ReplicaWriteError
    from .opening import carry_scope, pinning_scope
    from .verbs import (
        acarry_keys,
        carry_keys,
        direct,
        ignore_writes,
        is_pinned,
        offload,
        offload_this_request,
        pin_keys,
        pin_this_request,
        unpin_this_request,
        use_primary,
        use_replica,
    )

__all__ = [
    "ReplicaWriteError",
    "acarry_keys",
    "carry_keys",
    "carry_scope",
    "direct",
    "ignore_writes",
    "is_pinned",
    "offload",
    "offload_this_request",
    "pin_keys",
    "pin_this_request",
    "pinning_scope",
    "unpin_this_request",
    "use_primary",
    "use_replica",
]

_ELSEWHERE = {
    "ReplicaWriteError": "exceptions",
    "carry_scope": "opening",
    "pinning_scope": "opening",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"{__name__}.{_ELSEWHERE.get(name, 'verbs')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
