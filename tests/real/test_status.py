"""`pinning_status` and `pinning_check` against servers that are well and servers that are not."""

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

from pinning_middleware import stats
from pinning_middleware.management import live_check, poll
from pinning_middleware.management.commands import pinning_check
from pinning_middleware.routing.policy import Pool
from pinning_middleware.utils import counters
from tests.sight.test_commands import run

from .conftest import PostgreSQL, as_layout, look_around, stranger, titles, write
from .layouts import black_hole, database, eventually, frozen, make_role, promote

pytestmark = pytest.mark.real

# Seconds that the commands promise to take at most.
PROMISED = 3.0


@pytest.fixture(autouse=True)
def nothing_read_yet() -> None:
    counters.reads.clear()


def status() -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status of `pinning_status --json`, and its rows by alias."""
    started = time.monotonic()
    code, text = run("pinning_status", "--json")
    assert time.monotonic() - started < PROMISED
    answer = json.loads(text)
    assert answer["status"] == code
    return code, {row["alias"]: row for row in answer["servers"]}


def test_all_is_well(pg: PostgreSQL) -> None:
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
        assert row["age"] < PROMISED
    assert rows["pg1"]["behind_bytes"] == 0
    assert rows["pg1"]["lag"] == 0.0
    assert rows["pg1"]["position"] == rows["pg"]["position"]
    assert rows["pg1"]["reads"] >= 1
    said = run("pinning_status")[1]
    assert "2 of 2 replicas serve" in said
    assert max(map(len, said.splitlines())) <= 100


def test_a_paused_replica(pg: PostgreSQL) -> None:
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


def test_a_stopped_replica(pg: PostgreSQL) -> None:
    pg["pg1"].stop()
    code, rows = status()
    assert code == stats.DEGRADED
    assert (rows["pg1"]["state"], rows["pg1"]["reason"]) == ("out", "unreachable")
    assert rows["pg1"]["error"]
    assert rows["pg1"]["retry_in"] >= 0
    assert time.time() - rows["pg1"]["since"] < PROMISED
    assert rows["pg2"]["state"] == "in"


def test_frozen_servers(pg: PostgreSQL) -> None:
    with frozen(pg["pg1"]):
        code, rows = status()
        assert code == stats.DEGRADED
        assert (rows["pg1"]["state"], rows["pg1"]["reason"]) == ("out", "unreachable")
        assert rows["pg2"]["state"] == "in"
    with frozen(*pg.cluster.nodes.values()):
        code, rows = status()
        assert code == stats.DOWN
        assert {row["state"] for row in rows.values()} == {"out"}


def test_one_that_freezes_while_it_is_watched(pg: PostgreSQL) -> None:
    with poll.Asker() as asker:
        assert stats.verdict(asker.ask()) == stats.WELL
        with frozen(pg["pg1"]):
            rows = {row.alias: row for row in asker.ask()}
            assert (rows["pg1"].state, rows["pg1"].reason) == ("out", "unresponsive")
            assert rows["pg2"].state == "in"
        assert eventually(lambda: stats.verdict(asker.ask()) == stats.WELL)


def test_no_replica_and_no_primary(pg: PostgreSQL) -> None:
    for alias in ("pg1", "pg2"):
        pg[alias].stop()
    assert status()[0] == stats.DOWN
    pg["pg1"].start()
    pg["pg"].stop()
    code, rows = status()
    assert code == stats.DOWN
    assert (rows["pg"]["state"], rows["pg"]["reason"]) == ("out", "unreachable")


def test_a_promoted_replica(own_pg: PostgreSQL) -> None:
    promote(own_pg["pg1"])
    code, rows = status()
    assert code == stats.DEGRADED
    assert (rows["pg1"]["role"], rows["pg1"]["configured"]) == ("primary", "replica")
    assert (rows["pg1"]["state"], rows["pg1"]["reason"]) == ("out", "promoted")
    assert "primary!" in run("pinning_status")[1]


def test_an_address_that_never_answers(pg: PostgreSQL) -> None:
    with (
        black_hole() as hole,
        as_layout(
            pg,
            # The site's own patience has its way, and is no reason to wait here.
            hole=database(hole, options={"connect_timeout": 30}),
            replica=database(pg["pg2"]),
        ),
    ):
        code, rows = status()
        assert code == stats.DEGRADED
        assert (rows["hole"]["state"], rows["hole"]["reason"]) == ("out", "unresponsive")
        assert rows["hole"]["address"] == f"127.0.0.1:{hole.port}"
        assert rows["replica"]["state"] == "in"


def test_without_positions_it_is_at_least_connected_to(pg: PostgreSQL) -> None:
    with override_settings(PINNING_POSITIONS=False):
        assert status()[0] == stats.WELL
        pg["pg1"].stop()
        code, rows = status()
        assert code == stats.DEGRADED
        assert (rows["pg1"]["state"], rows["pg1"]["reason"]) == ("out", "unreachable")


def test_drained_is_no_fault(pg: PostgreSQL) -> None:
    with override_settings(PINNING_REPLICAS={"pg": {"pg1": 1, "pg2": 0}}):
        code, rows = status()
    assert code == stats.WELL
    assert (rows["pg2"]["state"], rows["pg2"]["reason"]) == ("out", "drained")


def test_the_rows_ask_nobody(pg: PostgreSQL, asked: Any) -> None:
    stats.servers()
    stats.get_stats()
    assert asked.all == []
    look_around()
    assert {row.alias for row in stats.servers() if row.state == "in"} >= {"pg1", "pg2"}


def test_what_the_command_asks_is_no_read_of_the_site(pg: PostgreSQL) -> None:
    with stranger():
        before = stats.get_stats()["reads"]
        status()
        assert stats.get_stats()["reads"] == before


# pinning_check --live


def check(*arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status of `pinning_check --live --json`, and what it says of each replica."""
    code, text = run("pinning_check", "--live", "--json", *arguments)
    answer = json.loads(text)
    assert answer["status"] == code
    (pool,) = answer["pools"].values()
    return code, {found["alias"]: found for found in pool["replicas"]} | {"pool": pool}


def outgoing_pins(pg: PostgreSQL) -> list[str]:
    """The marker tables that any server still has."""
    pg.wait_for()
    sql = "SELECT relname FROM pg_class WHERE relname LIKE 'pinning_check%'"
    return [
        row[0] for alias in ("pg", "pg1", "pg2") for row in pg[alias].execute(sql, database="site")
    ]


@pytest.fixture(autouse=True)
def settings_that_are_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own settings are none that a site would have."""
    monkeypatch.setattr(pinning_check, "run_checks", lambda tags: [])


def test_how_long_each_replica_takes(pg: PostgreSQL) -> None:
    code, found = check()
    assert code == 0
    for alias in ("pg1", "pg2"):
        assert found[alias]["address"] == f"127.0.0.1:{pg[alias].port}"
        assert 0 < found[alias]["shown_after"] <= found[alias]["known_after"] < 5
        last = found[alias]["moments"][-1]
        assert (last["served"], last["reason"], last["is_there"]) == ("replica", "caught_up", True)
    assert outgoing_pins(pg) == []
    assert "there after" in run("pinning_check", "--live")[1]


def test_a_replica_that_is_paused_until_later(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    resume = threading.Timer(1, pg["pg1"].resume)
    resume.start()
    code, found = check()
    resume.join()
    assert code == 0
    first, *_, last = found["pg1"]["moments"]
    assert (first["served"], first["reason"], first["is_there"]) == (
        "primary",
        "not_caught_up",
        False,
    )
    assert (last["served"], last["is_there"]) == ("replica", True)
    assert found["pg1"]["shown_after"] > 0.5 > found["pg2"]["shown_after"]


def test_a_replica_that_stays_paused(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    code, found = check("--timeout", "1")
    assert code == stats.DEGRADED
    assert found["pg1"]["shown_after"] is None
    assert {moment["served"] for moment in found["pg1"]["moments"]} == {"primary"}
    assert found["pg2"]["shown_after"] is not None
    pg.resume("pg1")
    assert outgoing_pins(pg) == []


def test_a_window_that_is_too_short(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    with override_settings(PINNING_SECONDS=0.5, PINNING_POSITIONS=False):
        code, found = check("--timeout", "1")
    assert code == stats.DOWN
    assert [moment["is_true"] for moment in found["pg1"]["moments"]] == [True, False]
    with override_settings(PINNING_SECONDS=0.5):
        assert "WRONG" in run("pinning_check", "--live", "--timeout", "1")[1]


def test_somebody_who_says_that_a_replica_has_it(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    pg.pause("pg1")
    monkeypatch.setattr(Pool, "asked_has", lambda self, alias, wanted: True)
    code, found = check("--timeout", "1")
    assert code == stats.DOWN
    assert not found["pg1"]["moments"][0]["is_true"]


def test_silent_servers_hold_nothing_up(pg: PostgreSQL) -> None:
    with frozen(pg["pg1"]):
        started = time.monotonic()
        code, found = check("--timeout", "1")
        assert time.monotonic() - started < PROMISED + 1 + live_check.GRACE
    assert code == stats.DEGRADED
    assert found["pg1"]["error"]
    assert found["pg2"]["known_after"] is not None
    with frozen(*pg.cluster.nodes.values()):
        started = time.monotonic()
        code, found = check("--timeout", "1")
        assert time.monotonic() - started < PROMISED
    assert code == stats.DOWN
    assert found["pool"]["error"]


def test_who_may_not_create_a_table(pg: PostgreSQL) -> None:
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
def test_which_rights_are_missing(pg: PostgreSQL, monitor: bool) -> None:
    role = make_role(pg.cluster, monitor=monitor)
    with as_layout(pg, replica=database(pg["pg1"], user=role)):
        code, found = check()
        assert code == 0
        rights = [(right["alias"], right["right"]) for right in found["pool"]["missing_rights"]]
    assert rights == ([] if monitor else [("replica", "pg_read_all_stats")])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_leaves_nothing_behind(pg: PostgreSQL, number: int) -> None:
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


def test_an_unknown_pool(pg: PostgreSQL) -> None:
    with pytest.raises(CommandError, match="is not a primary"):
        call_command("pinning_check", "--live", "--pool", "pg1")
