"""After a promotion that lost a commit, on PostgreSQL: nobody takes it as replayed."""

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
    look_again,
    look_around,
    pin_in,
    pool,
    position_in,
    server,
    server_for,
    server_of,
    stranger,
    titles,
    write,
)

pytestmark = pytest.mark.real


@pytest.fixture(params=["superuser", "plain"])
def role(own_pg: PostgreSQL, request: pytest.FixtureRequest) -> None:
    """Identification Django connects as: a plain role is not told which timeline a replica replays."""
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
    A pin of a commit that was lost: `pg1` was promoted without it, `pg2` follows `pg1`, and both
    are past the lost commit's position.
    """
    kept = write("kept")
    own_pg.wait_for()
    assert titles(kept) == ["kept"]
    look_around()
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
    """The site's primary is now the promoted node, as a changed name in the DNS would have it."""
    connections["pg"].close()
    connections.settings["pg"]["PORT"] = connections.settings["pg1"]["PORT"]
    connections["pg1"].close()
    with override_settings(PINNING_REPLICAS={"pg": ["pg2"]}):
        yield promoted


def test_the_pin_of_a_lost_commit_is_never_reached(
    switched: str, clock_at_writing: FrozenDateTimeFactory
) -> None:
    for _ in range(3):
        with stranger(switched) as scope:
            assert server() == "pg"
        assert scope.token == switched
    clock_at_writing.tick(16)
    assert server_for(switched) == "pg2"


@pytest.fixture
def clock_at_writing(switched: str) -> Iterator[FrozenDateTimeFactory]:
    written = datetime.fromtimestamp(pin_in(switched).until - 15, UTC)
    with freeze_time(written, real_asyncio=True) as frozen:
        yield frozen  # type: ignore[misc]


def test_what_was_known_of_the_old_timeline_does_not_count(switched: str) -> None:
    """A process that has seen both replicas before knows no more than a new one."""
    (log,) = position_in(switched)
    assert server_for(switched) == "pg"
    assert server_of("pg2").position.get(log, -1) < position_in(switched)[log]


def test_the_new_timeline_s_own_pins_end(switched: str, own_pg: PostgreSQL) -> None:
    token = write("new")
    (log,) = position_in(token)
    assert log.endswith("-2")
    assert eventually(lambda: server_for(token) == "pg2")
    assert titles(token) == ["kept", "new"]


def test_a_write_after_the_promotion_keeps_the_old_promise(switched: str) -> None:
    """Two logs that nobody can compare: the older pin ends by time."""
    with stranger(switched) as scope:
        Book.objects.create(title="new")
    pin = pin_in(scope.token)
    assert pin.held == pytest.approx(pin_in(switched).until, abs=0.001)
    assert all(log.endswith("-2") for log in pin.position or {})
    assert server_for(scope.token) == "pg"


def test_a_promoted_replica_is_noticed_and_left_out(promoted: str) -> None:
    """The site has not heard of it yet. One read finds the old connections lost, the next looks."""
    # A plain role's watcher may have met the follower while it was being restarted.
    if endpoint("pg2").out_of_rotation:
        look_again("pg2")
        assert eventually(lambda: not endpoint("pg2").out_of_rotation)
    assert {server_for(None) for _ in range(3)} <= {"pg1", "pg2"}
    assert {server_for(None) for _ in range(6)} == {"pg2"}
    assert pool().out == {"pg1"}
    # A plain role's watcher may have met it while it was down.
    assert endpoint("pg1").out_of_rotation in ("promoted", "unreachable")


def test_neither_the_promoted_nor_its_follower_has_the_lost_commit(promoted: str) -> None:
    for _ in range(3):
        with stranger(promoted), pytest.raises(OperationalError):
            server()


def test_a_promoted_replica_with_an_open_connection_is_noticed(own_pg: PostgreSQL) -> None:
    token = write()
    own_pg.wait_for()
    look_around()
    assert server_for(token) in ("pg1", "pg2")
    own_pg["pg1"].promote()
    # It says so with the next answer.
    for _ in range(2):
        server_for(None)
    assert {server_for(None) for _ in range(4)} == {"pg2"}
    assert {server_for(token) for _ in range(4)} == {"pg2"}


@pytest.mark.usefixtures("role")
def test_a_follower_of_another_primary_is_not_taken_for_a_replica(own_pg: PostgreSQL) -> None:
    """Two primaries at once: the site writes to the old one, and `pg2` follows the new one."""
    own_pg["pg1"].promote()
    own_pg["pg2"].follow(own_pg["pg1"])
    own_pg["pg1"].execute("SELECT pg_logical_emit_message(true, '', repeat('x', 100000))")
    token = write("new")
    behind = "SELECT pg_last_wal_replay_lsn() - '0/0'"
    (point,) = position_in(token).values()
    assert eventually(lambda: own_pg["pg2"].execute(behind)[0][0] > point)
    assert [server_for(token) for _ in range(3)] == ["pg"] * 3
