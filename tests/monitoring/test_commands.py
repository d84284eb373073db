"""The management commands on SQLite; ``tests/real`` runs them on servers with positions."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.test import override_settings

from pinning_middleware.management import poll
from pinning_middleware.management.commands import pinning_check, pinning_status
from pinning_middleware.stats import DEGRADED, DOWN, ServerState, servers
from pinning_middleware.testing import replicas
from pinning_middleware.utils import counters

ALIASES = ["default", "replica1", "replica2"]
pytestmark = pytest.mark.django_db(databases=ALIASES, transaction=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(name: str, *arguments: str, out: io.StringIO | None = None) -> tuple[int, str]:
    """Run a command; return its exit status and its output."""
    out = io.StringIO() if out is None else out
    try:
        call_command(name, *arguments, stdout=out, no_color=True)
    except SystemExit as ended:
        return int(str(ended.code)), out.getvalue()
    return 0, out.getvalue()


@pytest.fixture(autouse=True)
def reset_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    counters.reads.clear()
    # Independent of the terminal of the tests.
    monkeypatch.setenv("COLUMNS", "100")


PRIMARY = ServerState(
    pool="default",
    alias="default",
    address="10.0.0.1:5432",
    configured="primary",
    role="primary",
    state="in",
    position="0/54A0248",
    age=0.1,
)
OK = PRIMARY._replace(
    alias="replica1", address="10.0.0.2:5432", configured="replica", role="replica", weight=1
)
OUT = OK._replace(
    alias="replica2",
    state="out",
    reason="unreachable",
    retry_in=9.6,
    age=None,
    behind_bytes=646160,
    lag=5.1,
    error="connection timeout\nexpired",
)


@pytest.mark.parametrize(
    ("placement", "text"),
    [({"tier": 1}, "1"), ({"tier": 2}, "1, tier 2"), ({"groups": ("a", "b")}, "1, for a and b")],
)
def test_weight_is_shown_with_tier_and_groups(placement: dict[str, Any], text: str) -> None:
    assert OK._replace(**placement).share == text


def test_servers_of_a_pool_have_tier_and_groups() -> None:
    members = {"replica1": {"tier": 2}, "replica2": {"groups": ["reports"]}}
    with override_settings(PINNING_REPLICAS={"default": members}):
        found = {row.alias: (row.tier, row.groups, row.share) for row in servers()}
    assert found == {
        "default": (None, None, None),
        "replica1": (2, None, "1, tier 2"),
        "replica2": (1, ("reports",), "1, for reports"),
    }


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[ServerState]:
    """The states that every poll returns."""
    found = [PRIMARY, OK, OUT]
    monkeypatch.setattr(poll.ServerPoll, "poll", lambda self: list(found))
    return found


# pinning_status


def test_status_prints_a_table(rows: list[ServerState]) -> None:
    code, text = run("pinning_status")
    assert code == DEGRADED
    assert text.splitlines()[:8] == [
        "Pool default: 1 of 2 replicas in rotation; lag threshold 15 s.",
        "server    role     state             weight  reads  position   behind         probed",
        "default   primary  in                     -      0  0/54A0248  -              0.1 s ago",
        "  10.0.0.1:5432",
        "replica1  replica  in                     1      0  0/54A0248  -              0.1 s ago",
        "  10.0.0.2:5432",
        "replica2  replica  out: unreachable       1      0  0/54A0248  646 kB, 5.1 s  -",
        "  10.0.0.2:5432  retry in 9.6 s; connection timeout expired",
    ]


def test_status_table_fits_the_terminal(rows: list[ServerState]) -> None:
    gtid = ",".join(f"0-{number}-123456" for number in range(9))
    rows[:] = [
        row._replace(position=gtid, error="a long story " * 20, since=time.time() - 100)
        for row in rows
    ]
    lines = run("pinning_status", out=Terminal())[1].splitlines()
    assert max(map(len, lines)) <= 100
    assert any("  0-0-123456" in line and "…" in line for line in lines)
    assert any(line.startswith("server ") for line in lines)


def test_status_errors_are_complete_with_and_without_a_terminal(rows: list[ServerState]) -> None:
    error = f"connection failed: {'x ' * 60}FATAL: role does not exist"
    rows[2] = rows[2]._replace(error=error, position=",".join(["0-1-123456"] * 9))
    _, piped = run("pinning_status")
    assert error in piped
    assert "…" not in piped
    _, shown = run("pinning_status", out=Terminal())
    assert error in " ".join(shown.split())


def test_status_prints_records_on_a_narrow_terminal(
    rows: list[ServerState], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    _, text = run("pinning_status", out=Terminal())
    assert "replica2\n  role     replica\n  state    out: unreachable\n" in text
    assert "  retry in 9.6 s\n  error    connection timeout expired\n" in text


def test_status_json(rows: list[ServerState]) -> None:
    code, text = run("pinning_status", "--json")
    answer = json.loads(text)
    assert (code, answer["status"]) == (DEGRADED, DEGRADED)
    assert answer["servers"] == [row._asdict() for row in rows]
    assert answer["pools"]["default"]["usable"] == 1


@pytest.fixture
def three_times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the sleeps, and raise KeyboardInterrupt at the third one."""
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(pinning_status.time, "sleep", sleep)
    return pauses


def test_status_watch_repeats_until_interrupted(
    rows: list[ServerState], three_times: list[float]
) -> None:
    code, text = run("pinning_status", "--watch", "--json")
    assert (code, three_times) == (DEGRADED, [2.0] * 3)
    assert [json.loads(line)["status"] for line in text.splitlines()] == [DEGRADED] * 3
    three_times.clear()
    assert "\033" not in run("pinning_status", "--watch", "5")[1]
    assert three_times == [5.0] * 3


def test_status_exit_status_is_the_health(rows: list[ServerState]) -> None:
    del rows[2]
    assert run("pinning_status")[0] == 0
    rows[0] = rows[0]._replace(state="out", reason="unresponsive")
    assert run("pinning_status")[0] == DOWN


def test_status_of_databases_without_positions() -> None:
    code, text = run("pinning_status", "--json")
    assert code == 0
    assert {row["alias"]: row["state"] for row in json.loads(text)["servers"]} == dict.fromkeys(
        ALIASES, "in"
    )


def test_status_of_an_unreachable_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.settings["replica1"], "NAME", "/nowhere/at/all")
    code, text = run("pinning_status", "--json")
    assert code == DEGRADED
    found = {row["alias"]: row for row in json.loads(text)["servers"]}
    assert (found["replica1"]["state"], found["replica1"]["reason"]) == ("out", "unreachable")
    assert "unable to open" in found["replica1"]["error"]


def test_status_replica_with_the_settings_of_the_primary_is_degraded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = connections.settings["default"]["NAME"]
    monkeypatch.setitem(connections.settings["replica1"], "NAME", name)
    code, text = run("pinning_status", "--json")
    found = {row["alias"]: row for row in json.loads(text)["servers"]}
    assert code == DEGRADED
    assert found["replica1"]["error"] == "it has the same HOST, PORT and NAME as default"
    assert found["replica2"]["error"] == ""


def test_status_logs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(connections.settings["replica1"], "NAME", "/nowhere/at/all")
    run("pinning_status")
    assert caplog.messages == []


def test_status_without_replicas_or_disabled() -> None:
    with override_settings(PINNING_REPLICAS=[]):
        assert run("pinning_status")[0] == 0
        assert "PINNING_REPLICAS is empty" in run("pinning_status")[1]
    with override_settings(PINNING_ENABLED=False):
        assert "PINNING_ENABLED is False" in run("pinning_status")[1]


# pinning_check


def test_check_reports_system_checks() -> None:
    with override_settings(PINNING_SECONDS="soon"):
        code, text = run("pinning_check")
        assert code == DOWN
        assert "PINNING_SECONDS" in text
        found = json.loads(run("pinning_check", "--json")[1])["checks"]
        with override_settings(SILENCED_SYSTEM_CHECKS=[check["id"] for check in found]):
            assert run("pinning_check") == (
                0,
                "System check identified no issues (pinning_middleware).\n",
            )


def test_check_live_row_not_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning_check, "run_checks", lambda tags: [])
    code, text = run("pinning_check", "--live", "--timeout", "1")
    assert code == DEGRADED
    assert "replica1" in text
    assert "primary pinned" in text
    assert "System check identified no issues" in text
    tables = connections["default"].introspection.table_names()
    assert not any(name.startswith("pinning_check") for name in tables)


@pytest.mark.parametrize(
    ("reason", "values"),
    [
        ("disabled", {"PINNING_ENABLED": False}),
        ("drained", {"PINNING_REPLICAS": {"default": {"replica1": 0, "replica2": 0}}}),
    ],
)
def test_check_live_excluded_replicas_are_correct(
    reason: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning_check, "run_checks", lambda tags: [])
    with override_settings(PINNING_SECONDS=0, **values):
        code, text = run("pinning_check", "--live", "--json", "--timeout", "1")
    assert code == DEGRADED
    for found in json.loads(text)["pools"]["default"]["replicas"]:
        (sample,) = found["samples"]
        assert (sample["served"], sample["reason"]) == ("primary", reason)


def test_check_live_row_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning_check, "run_checks", lambda tags: [])
    current_position: Any = pinning_check.Pool.current_position

    def as_replication_would(pool: Any) -> Any:
        replicas.catch_up()
        return current_position(pool)

    monkeypatch.setattr(pinning_check.Pool, "current_position", as_replication_would)
    code, text = run("pinning_check", "--live", "--json", "--timeout", "1")
    assert code == 0
    found = json.loads(text)["pools"]["default"]["replicas"]
    assert all(each["visible_after"] is not None for each in found)
    # Without positions, a replica that has caught up is not detected.
    assert all(each["detected_after"] is None for each in found)


# Invalid settings

INVALID: list[tuple[dict[str, Any], str]] = [
    ({"PINNING_REPLICAS": ["typo"]}, "E002"),
    ({"PINNING_REPLICAS": {"typo": ["replica1"]}}, "E002"),
    ({"PINNING_REPLICAS": {"default": {"replica1": -1}}}, "E001"),
    ({"PINNING_REPLICAS": {None: []}}, "E001"),
    ({"PINNING_MAX_LAG": "five"}, "E005"),
]


@pytest.mark.parametrize(("values", "number"), INVALID)
@pytest.mark.parametrize("options", [[], ["--json"], ["--live"]])
def test_check_reports_invalid_settings(
    values: dict[str, Any], number: str, options: list[str]
) -> None:
    with override_settings(**values):
        code, text = run("pinning_check", *options)
    assert code == 2
    assert f"pinning_middleware.{number}" in text


@pytest.mark.parametrize(("values", "number"), [INVALID[0], INVALID[1], INVALID[4]])
def test_status_says_that_settings_are_invalid(values: dict[str, Any], number: str) -> None:
    with (
        override_settings(**values),
        pytest.raises(CommandError, match=r"Run manage\.py pinning_check") as raised,
    ):
        run("pinning_status")
    assert raised.value.returncode == 2
