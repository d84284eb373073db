"""Messages of the system checks. IDs are E001 … and W001 …, without the prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from django.core import checks

TAG: Final = "pinning"


def check(
    function: Callable[[], Iterable[checks.CheckMessage]],
) -> Callable[[], Iterable[checks.CheckMessage]]:
    """Register a system check that returns or yields messages."""
    # Django documents that a registered check returns a list.
    checks.register(lambda **kwargs: list(function()), TAG)
    return function


def error(number: str, message: str, hint: str) -> checks.Error:
    return checks.Error(message, hint=hint, id=f"pinning_middleware.{number}")


def warning(number: str, message: str, hint: str) -> checks.Warning:
    return checks.Warning(message, hint=hint, id=f"pinning_middleware.{number}")
