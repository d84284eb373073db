from __future__ import annotations

import logging

import pytest
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware.utils import logging as rate_limit
from pinning_middleware.utils.logging import log_rate_limited

logger = logging.getLogger("pinning_middleware.monitoring_tests")


@pytest.fixture(autouse=True)
def reset_rate_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "_last_logged", {})


def say(key: object = "a", level: int = logging.WARNING) -> bool:
    return log_rate_limited(
        logger, level, key, "%s is out", "replica1", extra={"alias": "replica1"}
    )


def test_log_rate_limited_repeats_after_a_minute(
    clock: FrozenDateTimeFactory, caplog: pytest.LogCaptureFixture
) -> None:
    assert [say() for _ in range(4)] == [True, False, False, False]
    clock.tick(59)
    assert not say()
    clock.tick(2)
    assert say()
    first, second = caplog.records
    assert first.getMessage() == "replica1 is out"
    assert (first.__dict__["alias"], first.__dict__["suppressed"]) == ("replica1", 0)
    assert second.__dict__["suppressed"] == 4
    assert first.filename == "test_rate_limited_logging.py"


def test_log_rate_limited_by_key() -> None:
    assert say("a")
    assert say("b")


def test_log_rate_limited_ignores_disabled_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger.name)
    assert not say()
    caplog.set_level(logging.WARNING, logger.name)
    assert say()


def test_log_rate_limited_keeps_a_limited_number_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "MOST", 2)
    for key in "abc":
        say(key)
    assert len(rate_limit._last_logged) == 2
    assert say("a")
    assert not say("c")


def test_log_rate_limited_exc_info(caplog: pytest.LogCaptureFixture) -> None:
    error = OSError("gone")
    assert log_rate_limited(logger, logging.ERROR, "a", "It broke", exc_info=error)
    assert "OSError: gone" in caplog.text
