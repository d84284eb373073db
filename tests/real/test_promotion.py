"""A promotion that lost a commit, on PostgreSQL: the commit never counts as replayed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from django.db import OperationalError, connections
from django.test import override_settings
from freezegun import freeze_time
from freezegun.api import FrozenDateTimeFactory

from tests.app.models import Book

from .conftest import (
    PostgreSQL,
    endpoint,
    eventually,
    make_retry_due,
    pin_in,
    pool,
    position_in,
    probe_replicas,
    server,
    server_for,
    server_of,
    titles,
    unrelated_scope,
    write,
)

pytestmark = pytest.mark.real


@pytest.fixture(params=["superuser", "plain"])
def role(own_pg: PostgreSQL, request: pytest.FixtureRequest) -> None:
    """The role of the site: an unprivileged one may not see a replica's timeline."""
    if request.param == "superuser":
        return
    own_pg["pg"].execute("CREATE ROLE plain LOGIN")
    for kind in ("TABLES", "SEQUENCES"):
        grant = f"GRANT ALL ON ALL {kind} IN SCHEMA public TO plain"
        own_pg["pg"].execute(grant, database="site")
    own_pg.wait_for()
    for alias in ("pg", "pg1", "pg2"):
        connections[alias].close()
        connections.settings[alias]["USER"] = "plain"


@pytest.fixture
def promoted(own_pg: PostgreSQL, role: None) -> str:
    """
    The pin of a lost commit: `pg1` was promoted without it, `pg2` follows `pg1`, and both
    are past the lost commit's position.
    """
    kept = write("kept")
    own_pg.wait_for()
    assert titles(kept) == ["kept"]
    probe_replicas()
    for alias in ("pg1", "pg2"):
        own_pg[alias].stop()
    lost = write("lost")
    (point,) = position_in(lost).values()
    own_pg["pg"].stop("immediate")
    own_pg["pg1"].start()
    own_pg["pg1"].promote()
    own_pg["pg2"].follow(own_pg["pg1"])
    own_pg["pg2"].start()
    behind = "SELECT coalesce(pg_last_wal_replay_lsn() - '0/0', 0)::bigint"
    own_pg["pg1"].execute("SELECT pg_logical_emit_message(true, '', repeat('x', 100000))")
    assert eventually(lambda: own_pg["pg2"].execute(behind)[0][0] > point)
    return lost


@pytest.fixture
def switched(own_pg: PostgreSQL, promoted: str) -> Iterator[str]:
    """Switch the site's primary to the promoted server, like a changed DNS record."""
    connections["pg"].close()
    connections.settings["pg"]["PORT"] = connections.settings["pg1"]["PORT"]
    connections["pg1"].close()
    with override_settings(PINNING_REPLICAS={"pg": ["pg2"]}):
        yield promoted


def test_pin_of_a_lost_commit_is_never_reached(
    switched: str, clock_at_writing: FrozenDateTimeFactory
) -> None:
    for _ in range(3):
        with unrelated_scope(switched) as scope:
            assert server() == "pg"
        assert scope.token == switched
    clock_at_writing.tick(86_401)
    assert server_for(switched) == "pg2"


@pytest.fixture
def clock_at_writing(switched: str) -> Iterator[FrozenDateTimeFactory]:
    written = datetime.fromtimestamp(pin_in(switched).until - 15, UTC)
    with freeze_time(written, real_asyncio=True) as frozen:
        yield frozen  # type: ignore[misc]


def test_state_of_the_old_timeline_is_ignored(switched: str) -> None:
    """A process that has probed both replicas before behaves like a new one."""
    (log,) = position_in(switched)
    assert server_for(switched) == "pg"
    assert server_of("pg2").position.get(log, -1) < position_in(switched)[log]


def test_pins_of_the_new_timeline_are_reached(switched: str, own_pg: PostgreSQL) -> None:
    token = write("new")
    (log,) = position_in(token)
    assert log.endswith("-2")

    def serves() -> bool:
        # A role that may not see timelines needs two points of the new timeline.
        own_pg["pg1"].execute("SELECT pg_logical_emit_message(true, '', 'more')")
        return server_for(token) == "pg2"

    assert eventually(serves)
    assert titles(token) == ["kept", "new"]


def test_write_after_the_promotion_keeps_the_older_pin(switched: str) -> None:
    """The two logs cannot be compared: the older pin ends with its window."""
    with unrelated_scope(switched) as scope:
        Book.objects.create(title="new")
    pin = pin_in(scope.token)
    assert pin.primary_only_until == pytest.approx(pin_in(switched).until, abs=0.001)
    assert all(log.endswith("-2") for log in pin.position.points)
    assert server_for(scope.token) == "pg"


def test_promoted_replica_is_detected_and_out_of_rotation(promoted: str) -> None:
    """Before the switch. One read finds the old connections lost, the next one probes."""
    # The monitor of an unprivileged role may have probed the follower during its restart.
    if endpoint("pg2").out_of_rotation:
        make_retry_due("pg2")
        assert eventually(lambda: not endpoint("pg2").out_of_rotation)
    assert {server_for(None) for _ in range(3)} <= {"pg1", "pg2"}
    assert {server_for(None) for _ in range(6)} == {"pg2"}
    assert pool().replica_set.out_of_rotation == {"pg1"}
    # The monitor of an unprivileged role may have tried it while it was down.
    assert endpoint("pg1").out_of_rotation in ("promoted", "unreachable")


def test_promoted_server_and_its_follower_have_not_caught_up(promoted: str) -> None:
    for _ in range(3):
        with unrelated_scope(promoted), pytest.raises(OperationalError):
            server()


def test_promoted_replica_with_an_open_connection_is_detected(own_pg: PostgreSQL) -> None:
    token = write()
    own_pg.wait_for()
    probe_replicas()
    assert server_for(token) in ("pg1", "pg2")
    own_pg["pg1"].promote()
    # It reports this with the next reply.
    for _ in range(2):
        server_for(None)
    assert {server_for(None) for _ in range(4)} == {"pg2"}
    assert {server_for(token) for _ in range(4)} == {"pg2"}


@pytest.mark.usefixtures("role")
def test_follower_of_another_primary_is_out_of_rotation(own_pg: PostgreSQL) -> None:
    """Two primaries: the site writes to the old one, and `pg2` follows the new one."""
    own_pg["pg1"].promote()
    own_pg["pg2"].follow(own_pg["pg1"])
    own_pg["pg1"].execute("SELECT pg_logical_emit_message(true, '', repeat('x', 100000))")
    token = write("new")
    behind = "SELECT pg_last_wal_replay_lsn() - '0/0'"
    (point,) = position_in(token).values()
    assert eventually(lambda: own_pg["pg2"].execute(behind)[0][0] > point)
    assert [server_for(token) for _ in range(3)] == ["pg"] * 3
