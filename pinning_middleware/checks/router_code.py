"""The aliases that the code of a router names, even if it returns them in some requests only."""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import Any


def aliases_in_code(router: Any, action: str, known: Container[str]) -> list[str]:
    """
    Return the known aliases among the constants of a method.

    Those that it has from a setting or from another function are not found.
    """
    method = getattr(router, action, None)
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    names = () if code is None else code.co_consts
    return [name for name in names if isinstance(name, str) and name in known]
