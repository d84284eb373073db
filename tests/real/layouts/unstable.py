"""The servers that tests/unstable-servers has downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NoReturn

import pytest

_CACHE: Final = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
UNSTABLE: Final = Path("/var/cache" if os.geteuid() == 0 else _CACHE) / "pinning-tests" / "unstable"


def not_run(what: str) -> NoReturn:
    """Skip a test without its server, which some days can't be downloaded."""
    why = f"NOT RUN: {what} is missing: run tests/unstable-servers"
    if os.environ.get("REQUIRE_UNSTABLE"):
        pytest.fail(why)
    pytest.skip(why)
