"""Polling for a condition, and skipping tests without their server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it in CI, where all servers should be installed."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def eventually(condition: Callable[[], object], timeout: float = 20) -> bool:
    """Poll until the condition holds; return whether it did in time."""
    deadline = time.perf_counter() + timeout
    while not condition():
        if time.perf_counter() > deadline:
            return False
        time.sleep(0.005)
    return True
