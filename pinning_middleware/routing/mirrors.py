"""Replicas that are the very database of their primary, as a test runner makes them."""

from __future__ import annotations

import sys
from typing import Any

from django.db import connections

__all__ = ["Mirrors", "is_testing"]


def is_testing() -> bool:
    """Return whether Django's test environment is set up, by whatever runner."""
    utils = sys.modules.get("django.test.utils")
    return utils is not None and hasattr(utils._TestState, "saved_data")


class Mirrors:
    """Tells whether an alias leads to the database of a primary."""

    def __init__(self, primary: str) -> None:
        self._primary = primary
        self._known: dict[str, tuple[dict[str, Any], dict[str, Any], object, object, bool]] = {}

    def __call__(self, alias: str) -> bool:
        known = self._known.get(alias)
        if known is not None:
            primary, replica, name, mirrored, verdict = known
            # The test runner changes the names in place.
            if name is primary["NAME"] and mirrored is replica["NAME"]:
                return verdict
        primary, replica = connections.settings[self._primary], connections.settings[alias]
        verdict = alias == self._primary or _is_mirror(self._primary, primary, replica)
        self._known[alias] = primary, replica, primary["NAME"], replica["NAME"], verdict
        return verdict


def _is_mirror(alias: str, primary: dict[str, Any], replica: dict[str, Any]) -> bool:
    # What it is says TEST["MIRROR"]: a worker of a parallel run renames only what its tests use.
    if is_testing() and replica["TEST"].get("MIRROR") == alias:
        return True
    if any(primary[part] != replica[part] for part in ("ENGINE", "HOST", "PORT", "NAME")):
        return False
    # Two of these are two databases.
    if primary["NAME"] == ":memory:":
        return False
    elsewhere = (
        *("service", "host", "hostaddr", "port", "target_session_attrs", "load_balance_hosts"),
        *("read_default_file", "unix_socket"),
    )
    return all(primary["OPTIONS"].get(o) == replica["OPTIONS"].get(o) for o in elsewhere)
