"""The judgement of every setting, and of what stands beside it."""

from __future__ import annotations

from . import site, values

__all__ = ["site", "values"]
