"""System checks of the settings, and of the project around them."""

from __future__ import annotations

from django.core.checks import register

from pinning_middleware.checks import migration, project, servers, settings
from pinning_middleware.checks.messages import TAG

__all__ = ["migration", "project", "servers", "settings"]

register(migration.check_leftovers, TAG)
