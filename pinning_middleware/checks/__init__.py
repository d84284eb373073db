"""The judgement of every setting, and of what stands beside it."""

from __future__ import annotations

from django.core.checks import register

from pinning_middleware.checks import migration, project, settings

__all__ = ["migration", "project", "settings"]

register(migration.check_leftovers, settings.TAG)
