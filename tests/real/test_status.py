"""`pinning_status` and `pinning_check` with healthy and failing servers."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.test import override_settings

from pinning_middleware import stats, status_page
from pinning_middleware.management import live_check, poll
from pinning_middleware.management.commands import pinning_check
from pinning_middleware.routing.replica_set import ReplicaSet
from pinning_middleware.servers import monitor
from pinning_middleware.utils import counters
from tests.monitoring.test_commands import run

from .conftest import PostgreSQL, as_layout, pool, probe_replicas, titles, unrelated_scope, write
from .layouts import black_hole, database, eventually, frozen, make_role, promote

pytestmark = pytest.mark.real

# Maximum duration of the commands (seconds).
MAX_DURATION = 3.0


@pytest.fixture(autouse=True)
def reset_counters() -> None:
    counters.reads.clear()


def status() -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the exit status of `pinning_status --json`, and its rows by alias."""
    started = time.monotonic()
    code, text = run("pinning_status", "--json")
    assert time.monotonic() - started < MAX_DURATION
    answer = json.loads(text)
    assert answer["status"] == code
    return code, {row["alias"]: row for row in answer["servers"]}


def test_status_of_healthy_servers_is_ok(pg: PostgreSQL) -> None:
    write()
    pg.wait_for()
    for _ in range(2):
        titles()
    code, rows = status()
    assert code == 0
    assert {alias: (row["role"], row["state"]) for alias, row in rows.items()} == {
        "pg": ("primary", "in"),
        "pg1": ("replica", "in"),
        "pg2": ("replica", "in"),
    }
    for alias, row in rows.items():
        assert row["address"] == f"127.0.0.1:{pg[alias].port}"
        assert row["age"] < MAX_DURATION
    assert rows["pg1"]["behind_bytes"] == 0
    assert rows["pg1"]["lag"] == 0.0
    assert rows["pg1"]["position"] == rows["pg"]["position"]
    assert rows["pg1"]["reads"] >= 1
    said = run("pinning_status")[1]
    assert "2 of 2 replicas in rotation" in said
    assert max(map(len, said.splitlines())) <= 100


def test_status_of_a_paused_replica(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    write()
    code, rows = status()
    assert code == stats.DEGRADED
    assert rows["pg1"]["state"] == "in"
    assert rows["pg1"]["error"] == "its replay is paused"
    assert rows["pg1"]["behind_bytes"] > 0
    assert rows["pg1"]["lag"] > 0
    assert rows["pg2"]["error"] == ""
    assert "its replay is paused" in run("pinning_status")[1]


def test_status_of_replicas_that_all_lag(pg: PostgreSQL) -> None:
    pg.pause()
    write()
    with override_settings(PINNING_MAX_LAG=0.001):
        code, rows = status()
        text = run("pinning_status")[1]
    assert code == stats.DEGRADED
    serving = [rows[alias] for alias in ("pg1", "pg2") if rows[alias]["state"] == "in"]
    assert [row["error"] for row in serving] == [
        "lags, but serves because no other replica is in rotation"
    ]
    assert {row["reason"] for row in rows.values()} == {"", "lag"}
    assert "lags, but serves because no other replica is in rotation" in text
    assert "1 of 2 replicas in rotation" in text


def test_errors_are_shown_whole_where_the_output_is_no_terminal(pg: PostgreSQL) -> None:
    with as_layout(pg, replica=database(pg["pg1"], user="a_role_that_is_missing")):
        text = run("pinning_status")[1]
    assert 'FATAL:  role "a_role_that_is_missing" does not exist'.replace("  ", " ") in text


def test_status_page_measures_lag_once_a_replica_is_read(pg: PostgreSQL) -> None:
    def lags() -> dict[str, float | None]:
        rows = status_page._state()["servers"]
        return {row["alias"]: row["lag"] for row in rows if row["configured"] == "replica"}

    pool().current_position()
    probe_replicas()
    counters.reads.clear()
    assert lags() == {"pg1": None, "pg2": None}
    assert monitor._monitors == {}
    titles()
    assert eventually(lambda: None not in lags().values())


def test_status_of_a_stopped_replica(pg: PostgreSQL) -> None:
    pg["pg1"].stop()
    code, rows = status()
    assert code == stats.DEGRADED
    assert (rows["pg1"]["state"], rows["pg1"]["reason"]) == ("out", "unreachable")
    assert rows["pg1"]["error"]
    assert rows["pg1"]["retry_in"] >= 0
    assert time.time() - rows["pg1"]["since"] < MAX_DURATION
    assert rows["pg2"]["state"] == "in"


def test_status_of_frozen_servers(pg: PostgreSQL) -> None:
    with frozen(pg["pg1"]):
        code, rows = status()
        assert code == stats.DEGRADED
        assert (rows["pg1"]["state"], rows["pg1"]["reason"]) == ("out", "unreachable")
        assert rows["pg2"]["state"] == "in"
    with frozen(*pg.cluster.nodes.values()):
        code, rows = status()
        assert code == stats.DOWN
        assert {row["state"] for row in rows.values()} == {"out"}


def test_status_watch_of_a_server_that_freezes(pg: PostgreSQL) -> None:
    with poll.ServerPoll() as server_poll:
        assert stats.health(server_poll.poll()) == stats.OK
        with frozen(pg["pg1"]):
            rows = {row.alias: row for row in server_poll.poll()}
            assert (rows["pg1"].state, rows["pg1"].reason) == ("out", "unresponsive")
            assert rows["pg2"].state == "in"
        assert eventually(lambda: stats.health(server_poll.poll()) == stats.OK)


def test_status_without_a_replica_or_primary(pg: PostgreSQL) -> None:
    for alias in ("pg1", "pg2"):
        pg[alias].stop()
    assert status()[0] == stats.DOWN
    pg["pg1"].start()
    pg["pg"].stop()
    code, rows = status()
    assert code == stats.DOWN
    assert (rows["pg"]["state"], rows["pg"]["reason"]) == ("out", "unreachable")


def test_status_of_a_promoted_replica(own_pg: PostgreSQL) -> None:
    promote(own_pg["pg1"])
    code, rows = status()
    assert code == stats.DEGRADED
    assert (rows["pg1"]["role"], rows["pg1"]["configured"]) == ("primary", "replica")
    assert (rows["pg1"]["state"], rows["pg1"]["reason"]) == ("out", "promoted")
    assert "primary!" in run("pinning_status")[1]


def test_status_of_an_unresponsive_address(pg: PostgreSQL) -> None:
    with (
        black_hole() as hole,
        as_layout(
            pg,
            # The timeouts of the site are unchanged, and do not delay the command.
            hole=database(hole, options={"connect_timeout": 30}),
            replica=database(pg["pg2"]),
        ),
    ):
        code, rows = status()
        assert code == stats.DEGRADED
        assert (rows["hole"]["state"], rows["hole"]["reason"]) == ("out", "unreachable")
        assert rows["hole"]["address"] == f"127.0.0.1:{hole.port}"
        assert rows["replica"]["state"] == "in"


def test_status_without_positions_connects(pg: PostgreSQL) -> None:
    with override_settings(PINNING_POSITIONS=False):
        assert status()[0] == stats.OK
        pg["pg1"].stop()
        code, rows = status()
        assert code == stats.DEGRADED
        assert (rows["pg1"]["state"], rows["pg1"]["reason"]) == ("out", "unreachable")


def test_replica_alias_of_another_database_is_degraded(pg: PostgreSQL) -> None:
    with as_layout(pg, replica=database(pg["pg1"])):
        connections.settings["replica"]["NAME"] = "postgres"
        code, rows = status()
        checked, found = check("--timeout", "1")
        _, text = run("pinning_check", "--live", "--timeout", "1")
    error = "it is connected to the database 'postgres', but site is connected to 'site'"
    assert (code, rows["replica"]["error"]) == (stats.DEGRADED, error)
    assert (rows["replica"]["role"], rows["site"]["error"]) == ("replica", "")
    assert checked == stats.DOWN
    assert found["replica"]["error"] == error
    assert f"error: {error}" in text


def test_replica_alias_of_the_primary_is_degraded(pg: PostgreSQL) -> None:
    with as_layout(pg, replica=database(pg["pg"])):
        code, rows = status()
        checked, found = check("--timeout", "1")
    error = "it is connected to the primary (site), not to a replica"
    assert (code, rows["replica"]["error"]) == (stats.DEGRADED, error)
    assert (checked, found["replica"]["error"]) == (stats.DEGRADED, error)


def test_live_check_of_a_primary_alias_of_a_replica_says_read_only(pg: PostgreSQL) -> None:
    with as_layout(pg, replica=database(pg["pg2"])):
        connections.settings["site"].update(database(pg["pg1"]))
        connections["site"].close()
        code, found = check("--timeout", "1")
    assert code == stats.DOWN
    assert found["pool"]["error"].startswith(
        "site is read-only, because it is connected to a replica"
    )


def test_drained_replica_is_not_degraded(pg: PostgreSQL) -> None:
    with override_settings(PINNING_REPLICAS={"pg": {"pg1": 1, "pg2": 0}}):
        code, rows = status()
    assert code == stats.OK
    assert (rows["pg2"]["state"], rows["pg2"]["reason"]) == ("out", "drained")


def test_server_rows_run_no_query(pg: PostgreSQL, asked: Any) -> None:
    stats.servers()
    stats.get_stats()
    assert asked.all == []
    probe_replicas()
    assert {row.alias for row in stats.servers() if row.state == "in"} >= {"pg1", "pg2"}


def test_status_queries_are_not_counted_as_reads(pg: PostgreSQL) -> None:
    with unrelated_scope():
        before = stats.get_stats()["reads"]
        status()
        assert stats.get_stats()["reads"] == before


# pinning_check --live


def check(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Return the exit status of `pinning_check --live --json`, and its results by replica."""
    code, text = run("pinning_check", "--live", "--json", *arguments)
    answer = json.loads(text)
    assert answer["status"] == code
    (pool,) = answer["pools"].values()
    return code, {found["alias"]: found for found in pool["replicas"]} | {"pool": pool}


def outgoing_pins(pg: PostgreSQL) -> list[str]:
    """Return the marker tables that still exist on any server."""
    pg.wait_for()
    sql = "SELECT relname FROM pg_class WHERE relname LIKE 'pinning_check%'"
    return [
        row[0] for alias in ("pg", "pg1", "pg2") for row in pg[alias].execute(sql, database="site")
    ]


@pytest.fixture(autouse=True)
def skip_system_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence the system checks, because the tests' settings differ from those of a site."""
    monkeypatch.setattr(pinning_check, "run_checks", lambda tags: [])


def test_live_check_measures_each_replica(pg: PostgreSQL) -> None:
    code, found = check()
    assert code == 0
    for alias in ("pg1", "pg2"):
        assert found[alias]["address"] == f"127.0.0.1:{pg[alias].port}"
        assert 0 < found[alias]["visible_after"] <= found[alias]["detected_after"] < 5
        last = found[alias]["samples"][-1]
        assert (last["served"], last["reason"], last["visible"]) == ("replica", "caught_up", True)
    assert outgoing_pins(pg) == []
    assert "row visible after" in run("pinning_check", "--live")[1]


def test_live_check_of_a_replica_paused_for_a_while(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    resume = threading.Timer(1, pg["pg1"].resume)
    resume.start()
    code, found = check()
    resume.join()
    assert code == 0
    first, *_, last = found["pg1"]["samples"]
    assert (first["served"], first["reason"], first["visible"]) == (
        "primary",
        "not_caught_up",
        False,
    )
    assert (last["served"], last["visible"]) == ("replica", True)
    assert found["pg1"]["visible_after"] > 0.5 > found["pg2"]["visible_after"]


def test_live_check_of_a_paused_replica(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    code, found = check("--timeout", "1")
    assert code == stats.DEGRADED
    assert found["pg1"]["visible_after"] is None
    assert {sample["served"] for sample in found["pg1"]["samples"]} == {"primary"}
    assert found["pg2"]["visible_after"] is not None
    pg.resume("pg1")
    assert outgoing_pins(pg) == []


def test_live_check_detects_a_short_window(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    with override_settings(PINNING_SECONDS=0.5, PINNING_POSITIONS=False):
        code, found = check("--timeout", "1")
    assert code == stats.DOWN
    assert [sample["correct"] for sample in found["pg1"]["samples"]] == [True, False]
    with override_settings(PINNING_SECONDS=0.5):
        assert "WRONG" in run("pinning_check", "--live", "--timeout", "1")[1]


def test_live_check_detects_a_wrong_caught_up_report(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    pg.pause("pg1")
    monkeypatch.setattr(ReplicaSet, "probe_caught_up", lambda self, alias, wanted: True)
    code, found = check("--timeout", "1")
    assert code == stats.DOWN
    assert not found["pg1"]["samples"][0]["correct"]


def test_live_check_does_not_wait_for_unresponsive_servers(pg: PostgreSQL) -> None:
    with frozen(pg["pg1"]):
        started = time.monotonic()
        code, found = check("--timeout", "1")
        assert time.monotonic() - started < MAX_DURATION + 1 + live_check.GRACE
    assert code == stats.DEGRADED
    assert found["pg1"]["error"]
    assert found["pg2"]["detected_after"] is not None
    with frozen(*pg.cluster.nodes.values()):
        started = time.monotonic()
        code, found = check("--timeout", "1")
        assert time.monotonic() - started < MAX_DURATION
    assert code == stats.DOWN
    assert found["pool"]["error"]


def test_live_check_without_permission_to_create_a_table(pg: PostgreSQL) -> None:
    role = make_role(pg.cluster)
    pg["pg"].execute(f"REVOKE ALL ON SCHEMA public FROM {role}", database="site")
    pg.wait_for()
    try:
        with as_layout(pg, replica=database(pg["pg1"], user=role)):
            connections.settings["site"]["USER"] = role
            connections["site"].close()
            code, found = check("--timeout", "1")
    finally:
        make_role(pg.cluster)
    assert code == stats.DOWN
    assert "permission denied" in found["pool"]["error"]


@pytest.mark.parametrize("monitor", [False, True])
def test_live_check_reports_missing_privileges(pg: PostgreSQL, monitor: bool) -> None:
    role = make_role(pg.cluster, monitor=monitor)
    with as_layout(pg, replica=database(pg["pg1"], user=role)):
        code, found = check()
        assert code == 0
        rights = [
            (right["alias"], right["privilege"]) for right in found["pool"]["missing_privileges"]
        ]
    assert rights == ([] if monitor else [("replica", "pg_read_all_stats")])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_live_check_drops_its_table(pg: PostgreSQL, number: int) -> None:
    pg.pause("pg1", "pg2")
    sql = "SELECT count(*) FROM pg_class WHERE relname LIKE 'pinning_check%'"

    def interrupt() -> None:
        assert eventually(lambda: pg["pg"].execute(sql, database="site")[0][0] > 0)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        call_command("pinning_check", "--live", "--timeout", "20", stdout=io.StringIO())
    thread.join()
    assert number == signal.SIGINT or ended.value.code == 128 + number
    assert eventually(lambda: not any("pinning-check" in t.name for t in threading.enumerate()), 5)
    pg.resume()
    assert outgoing_pins(pg) == []


def test_unknown_pool_is_an_error(pg: PostgreSQL) -> None:
    with pytest.raises(CommandError, match="is not a primary"):
        call_command("pinning_check", "--live", "--pool", "pg1")
