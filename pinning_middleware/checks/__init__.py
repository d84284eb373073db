"""The judgement of every setting, and of what stands beside it."""

from __future__ import annotations

from django.core.checks import register

from . import coming_from, site, values

__all__ = ["coming_from", "site", "values"]

register(coming_from.check_leftovers, values.TAG)
