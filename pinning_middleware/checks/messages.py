"""Messages of the system checks. IDs are E001 … and W001 …, without the prefix."""

from __future__ import annotations

from typing import Final

from django.core import checks

__all__ = ["TAG", "error", "warning"]

TAG: Final = "pinning"


def error(number: str, message: str, hint: str) -> checks.Error:
    return checks.Error(message, hint=hint, id=f"pinning_middleware.{number}")


def warning(number: str, message: str, hint: str) -> checks.Warning:
    return checks.Warning(message, hint=hint, id=f"pinning_middleware.{number}")
