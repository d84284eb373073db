"""Positions of every dialect, as far as they need no server."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import OperationalError, connections

from pinning_middleware.pins import OPTIONAL, Pin, merge_positions
from pinning_middleware.servers.dialects import DIALECTS, Dialect, PositionUnavailable, dialect_for
from pinning_middleware.servers.dialects.mysql import (
    MySQL,
    parse_gtids,
    parse_last,
    parse_mariadb,
)
from pinning_middleware.servers.dialects.postgresql import (
    LSN,
    XID,
    XID_ALONE,
    PostgreSQL,
    end_of_record,
    parse_lsn,
)
from pinning_middleware.servers.registry import Identity, Report, Server

A, B = "3e11fa47-71ca-11e1-9e33-c80aa9429562", "4f22fb58-82db-22f2-af44-d91bb0530673"


def answers(*rows: Any) -> Callable[[str], tuple[Any, ...]]:
    """Return what asks a server that gives these answers, in turn."""
    left = list(rows)
    return lambda sql: left.pop(0)  # type: ignore[no-any-return]


def server(system: str = "", lacks_timeline_privilege: bool = False) -> Server:
    made = Server(Identity("now", "127.0.0.1", 5432), system)
    made.lacks_timeline_privilege = lacks_timeline_privilege
    return made


# PostgreSQL


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0/0", 0),
        ("0/3000060", 0x3000060),
        ("1/10", 0x100000010),
        ("A/FFFFFFFF", 0xAFFFFFFFF),
        ("FFFFFFFF/FFFFFFFF", 2**64 - 1),
    ],
)
def test_an_lsn_is_a_number(text: str, number: int) -> None:
    assert parse_lsn(text) == number


def test_lsns_are_not_compared_as_text() -> None:
    assert parse_lsn("10/0") > parse_lsn("9/FFFFFFFF")
    assert parse_lsn("0/1000000") > parse_lsn("0/FFFFFF")


SEGMENT = 16 * 1024 * 1024


@pytest.mark.parametrize(
    ("inserted", "end"),
    [
        (8192 * 5 + 24, 8192 * 5),
        (SEGMENT * 3 + 40, SEGMENT * 3),
        (8192 * 5 + 48, 8192 * 5 + 48),
        (8192 * 5, 8192 * 5),
        (8192 * 5 - 8, 8192 * 5 - 8),
        (8192 * 5 + 4096, 8192 * 5 + 4096),
        ((1 << 40) + 24, 1 << 40),
    ],
)
def test_the_header_of_a_page_is_no_record(inserted: int, end: int) -> None:
    assert end_of_record(inserted) == end


def postgresql(*row: Any, way: int = LSN, lacks_timeline_privilege: bool = False) -> Report:
    return PostgreSQL().read(row, server("ff", lacks_timeline_privilege), way)


def test_what_a_primary_of_postgresql_says() -> None:
    report = postgresql(False, "0/16018", "0000000A0000000000000001")
    assert report == Report(False, {"ff-10": 0x16018}, {"ff-10": 0x16000})


def test_what_a_replica_of_postgresql_says() -> None:
    assert postgresql(True, "0/3000060", "1") == Report(True, {"ff-1": 0x3000060})
    # No receiver runs: the timeline is unknown, and not the primary's.
    assert postgresql(True, "0/3000060", None) == Report(True, {"ff-": 0x3000060})


def test_a_role_without_rights_is_not_told_the_timeline() -> None:
    assert postgresql(True, "0/3000060", None, lacks_timeline_privilege=True).timeline_hidden
    assert not postgresql(True, "0/3000060", "1", lacks_timeline_privilege=True).timeline_hidden
    assert not postgresql(
        False, "0/3000060", "0000000100", lacks_timeline_privilege=True
    ).timeline_hidden


def test_one_that_replays_no_log_cannot_tell() -> None:
    with pytest.raises(PositionUnavailable):
        postgresql(True, None, None)


def test_transaction_ids_are_positions_of_another_log() -> None:
    primary = postgresql(False, "758", "0000000A0000000000000001", way=XID)
    replica = postgresql(True, "757", "10", way=XID)
    assert primary.written == {"ffx-10": 758}
    assert replica.replayed == {"ffx-10": 757}
    dialect = PostgreSQL()
    assert not dialect.reached(primary.written, replica.replayed)
    assert dialect.reached(primary.written, {"ffx-10": 758})
    # Never of an LSN, nor of another timeline.
    for log in ("ff-10", "ffx-1", "ffx-", "ffx"):
        assert not dialect.reached(primary.written, {log: 99999})


def test_where_not_even_the_timeline_may_be_asked() -> None:
    primary = postgresql(False, "758", None, way=XID_ALONE)
    assert primary.written == {"ffx": 758}
    assert PostgreSQL().reached(
        primary.written, postgresql(True, "758", None, way=XID_ALONE).replayed
    )


@pytest.mark.parametrize(
    ("choice", "ways"),
    [
        (True, (LSN, XID, XID_ALONE)),
        ("lsn", (LSN,)),
        ("xid", (XID, XID_ALONE)),
        ("gtid", ()),
        (False, ()),
    ],
)
def test_the_ways_of_postgresql(choice: Any, ways: tuple[int, ...]) -> None:
    assert PostgreSQL().strategies(choice) == ways


def test_which_server_of_postgresql() -> None:
    asked = answers(("2026-01-01 12:00:00.5+00", "10.0.0.7", 5432, 99, False))
    who, row = PostgreSQL().identify(asked, ("db", 6432), None)
    assert who == (Identity("2026-01-01 12:00:00.5+00", "10.0.0.7", 5432), 99, True)
    assert row == ()
    # Over a Unix socket; and how far it is in the same statement.
    asked = answers(("then", None, None, 99, True, True, "0/10", "1"))
    who, row = PostgreSQL().identify(asked, ("/run", 5433), LSN)
    assert who.identity == Identity("then", "/run", 5433)
    assert row == (True, "0/10", "1")


def test_postgresql_compares_within_a_timeline_of_a_cluster() -> None:
    dialect = PostgreSQL()
    assert dialect.reached({"ff-1": 10}, {"ff-1": 10})
    assert not dialect.reached({"ff-1": 11}, {"ff-1": 10})
    for other in ("ff-2", "ff-11", "fe-1", "ff-", ""):
        assert not dialect.reached({"ff-1": 10}, {other: 99})
        assert not dialect.reached({other: 10}, {"ff-1": 99})
    assert not dialect.reached({"ff-1": 10}, {})


@pytest.mark.parametrize("attribute", ["sqlstate", "pgcode"])
def test_postgresql_error_codes_of_both_drivers(attribute: str) -> None:
    error = OperationalError("conflict")
    assert PostgreSQL().error_code(error) is None
    error.__cause__ = type("DriverError", (Exception,), {attribute: "40001"})()
    assert PostgreSQL().error_code(error) == "40001"


@pytest.mark.parametrize(
    ("code", "is_lost", "is_retryable"),
    [
        ("40001", False, True),  # conflict with recovery
        ("40P01", False, True),  # a deadlock with recovery
        ("57P01", True, True),
        ("57P03", True, True),
        ("57P04", False, True),  # its database was dropped, on the primary
        ("08006", True, True),
        ("53300", False, True),  # too many connections
        ("53200", False, True),  # out of memory
        ("57014", False, False),  # a statement timeout, a cancel
        ("42P01", False, False),
        (None, False, False),
    ],
)
def test_errors_of_postgresql(code: str | None, is_lost: bool, is_retryable: bool) -> None:
    error = OperationalError("no")
    error.__cause__ = type("DriverError", (Exception,), {"sqlstate": code})()
    assert PostgreSQL().is_lost(error) is is_lost
    assert PostgreSQL().is_retryable(error) is is_retryable


# MariaDB


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", {}),
        ("0-1-8", {"0-1": 8}),
        ("0-1-8,5-2-30", {"0-1": 8, "5-2": 30}),
        (" 0-1-8, 10-22-3000000000000 ", {"0-1": 8, "10-22": 3000000000000}),
    ],
)
def test_gtids_of_mariadb(text: str, position: dict[str, int]) -> None:
    assert parse_mariadb(text) == position


def mariadb(*row: Any) -> Report:
    return MySQL().read(row, server("mariadb"), 0)


@pytest.mark.parametrize(
    ("own", "written", "position"),
    [
        ("0-1-8", "0-1-9", {"0-1": 9}),
        # What others wrote in another domain does not count for a replica that has none of it.
        ("0-1-8", "0-1-9,5-1-3", {"0-1": 9, "?5-1": 3}),
        # A connection that does not know which domain it wrote to.
        ("", "0-1-9,5-1-3", {"0-1": 9, "5-1": 3}),
        # After a promotion: by this server.
        ("0-1-8", "0-2-9", {"0-2": 9}),
    ],
)
def test_what_a_primary_of_mariadb_has_written(own: str, written: str, position: Any) -> None:
    assert mariadb("", written, 1, 0, own).written == position


@pytest.mark.parametrize(
    ("row", "is_replica"),
    [
        (("0-1-8", "", 2, 1), True),
        (("0-1-8", "0-1-8", 2, 0), True),
        # It has written itself, and is not read-only: promoted.
        (("0-1-8", "0-2-9", 2, 0), False),
        (("0-1-8", "0-2-9", 2, 1), True),
        # Another server's number that ends alike.
        (("0-1-8", "0-12-9", 2, 0), True),
        # A primary that never replicated, or a replica that does so without GTIDs.
        (("", "0-1-8", 1, 0), None),
    ],
)
def test_the_role_of_mariadb(row: tuple[Any, ...], is_replica: bool | None) -> None:
    report = mariadb(*row, "")
    assert report.is_replica is is_replica
    assert report.replayed == parse_mariadb(row[0])


def test_mariadb_without_gtids_cannot_tell() -> None:
    with pytest.raises(PositionUnavailable):
        mariadb("", "", 1, 0, "")


@pytest.mark.parametrize(
    ("wanted", "known", "reached"),
    [
        ({"0-1": 8}, {"0-1": 8}, True),
        ({"0-1": 8}, {"0-1": 7}, False),
        ({"0-1": 8}, {}, False),
        # Another server's transaction with that number, after a promotion.
        ({"0-1": 8}, {"0-2": 9}, False),
        ({"0-1": 8}, {"0-1": 7, "0-2": 9}, False),
        ({"0-1": 8}, {"5-1": 9}, False),
        ({"0-1": 8, "5-1": 3}, {"0-1": 8}, False),
        ({"0-1": 8, "5-1": 3}, {"0-1": 8, "5-1": 3}, True),
        # Of the shared domains only.
        ({"0-1": 8, "?5-1": 3}, {"0-1": 8}, True),
        ({"0-1": 8, "?5-1": 3}, {"0-1": 8, "5-1": 2}, False),
        ({"0-1": 8, "?5-1": 3}, {"0-1": 8, "5-1": 3}, True),
        ({"0-1": 8, "?5-1": 3}, {"0-1": 8, "5-2": 3}, False),
        ({"0-1": 8, "?5-1": 3}, {"0-1": 8, "15-1": 1}, True),
    ],
)
def test_mariadb_compares_shared_domains(
    wanted: dict[str, int], known: dict[str, int], reached: bool
) -> None:
    assert MySQL().reached(wanted, known) is reached


def test_mariadb_compares_as_numbers() -> None:
    assert MySQL().reached({"0-1": 9}, {"0-1": 10})


# MySQL


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", {}),
        (f"{A}:1-5", {A: 5}),
        (f"{A}:1", {A: 1}),
        (f"{A}:1-5:9-12", {A: 5}),
        (f"{A.upper()}:1-5,\n{B}:1-7", {A: 5, B: 7}),
        # Beyond a gap nothing is known to be complete, one at the beginning included.
        (f"{A}:7", {}),
        (f"{A}:5-9,{B}:1-2", {B: 2}),
        # Tags (8.3) count on their own.
        (f"{A}:1-5:backup:1-3", {A: 5, f"{A}:backup": 3}),
        (f"{A}:backup:1-3", {f"{A}:backup": 3}),
        (f"{A}:1-5:backup:2-3:x:1,{B}:1", {A: 5, f"{A}:x": 1, B: 1}),
    ],
)
def test_gtids_of_mysql(text: str, position: dict[str, int]) -> None:
    assert parse_gtids(text) == position


def mysql(executed: str, uuid: str, read_only: int, mode: str = "ON") -> Report:
    return MySQL().read((executed, uuid, read_only, mode), server("mysql"), 0)


@pytest.mark.parametrize(
    ("executed", "position"),
    [
        (f"{A}:1-5", {A: 5}),
        (f"{A}:1-5:9,{B}:1-700", {A: 9}),
        (f"{B}:1-700", None),
        ("", None),
        (f"{B}:1-700,\n{A.upper()}:1-5:backup:1-3", {A: 5, f"{A}:backup": 3}),
    ],
)
def test_mysql_current(executed: str, position: Any) -> None:
    assert parse_last(executed, A.upper()) == position
    assert mysql(executed, A, 0).written == position


def test_mysql_under_group_replication_tells_none() -> None:
    """All members write under the group's UUID."""
    assert mysql(f"{B}:1-700", A, 0).written is None


def test_mysql_without_gtids_cannot_tell() -> None:
    with pytest.raises(PositionUnavailable):
        mysql("", A, 0, "OFF_PERMISSIVE")


@pytest.mark.parametrize(
    ("row", "is_replica"),
    [
        ((f"{A}:1-5", B, 1), True),
        ((f"{A}:1-5", B, 0), True),
        ((f"{A}:1-5,{B}:1", B.upper(), 0), False),
        ((f"{A}:1-5,{B}:1", B, 1), True),
        (("", B, 1), None),
    ],
)
def test_the_role_of_mysql(row: tuple[str, str, int], is_replica: bool | None) -> None:
    assert mysql(*row)[:2] == (is_replica, parse_gtids(row[0]))


def test_mysql_reached() -> None:
    dialect = MySQL()
    assert dialect.reached({A: 5}, parse_gtids(f"{A}:1-5"))
    assert dialect.reached({A: 5}, parse_gtids(f"{A}:1-10,{B}:1-3"))
    assert not dialect.reached({A: 6}, parse_gtids(f"{A}:1-5:7-9"))
    assert not dialect.reached({A: 5}, parse_gtids(f"{B}:1-10"))
    assert not dialect.reached({A: 5}, parse_gtids(f"{A}:7"))
    assert not dialect.reached({f"{A}:backup": 2}, parse_gtids(f"{A}:1-10"))


@pytest.mark.parametrize("code", [2006, 2013, 1053, 1927, 2002])
def test_lost_connections_of_mysql(code: int) -> None:
    error = OperationalError(code, "gone")
    assert MySQL().error_code(error) in MySQL.retryable_errors


@pytest.mark.parametrize("error", [OperationalError(1317, "interrupted"), OperationalError(3024)])
def test_a_cancelled_query_is_none_of_them(error: OperationalError) -> None:
    assert MySQL().error_code(error) not in MySQL.retryable_errors


def test_errors_without_a_number() -> None:
    assert MySQL().error_code(OperationalError()) is None
    assert MySQL().error_code(OperationalError("gone")) is None


# Families


def test_mariadb_and_mysql_share_a_vendor() -> None:
    dialect = MySQL()
    who, row = dialect.identify(answers(("db1", 3306, 12, 7, 1700000000)), ("", 0), None)
    assert who == (Identity("mariadb 7 1700000000", "db1", 3306), 12, False)
    assert row == ()
    assert dialect.system(answers(), who.identity) == "mariadb"
    # MySQL does not know what MariaDB is asked.
    asked = [OperationalError(1193, "Unknown system variable"), ("db1", 3306, 12, A, 17, "x")]

    def ask(sql: str) -> Any:
        answer = asked.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    who, row = dialect.identify(ask, ("", 0), 0)
    assert who.identity.started == f"mysql {A} 17"
    assert row == ("x",)
    assert dialect.system(answers(), who.identity) == "mysql"


def test_comparing_and_choosing_take_no_connection() -> None:
    """The server may not be there."""
    dialect = dialect_for(SimpleNamespace(vendor="mysql"))  # type: ignore[arg-type]
    assert dialect is not None
    assert dialect.connect_timeout == "connect_timeout"
    assert dialect.reached({A: 5, f"{A}:backup": 1}, {A: 5, f"{A}:backup": 1})
    assert not dialect.reached({A: 5}, {A: 4})
    assert not dialect.reached({A: 5}, {B: 9})
    assert dialect.reached({"0-1": 8, "?5-1": 3}, {"0-1": 8})
    assert not dialect.reached({"0-1": 8}, {"0-2": 9})


def test_postgresql_is_one_object() -> None:
    connection: Any = SimpleNamespace(vendor="postgresql")
    assert type(dialect_for(connection)) is PostgreSQL
    assert dialect_for(connection) is dialect_for(connection)


def test_sqlite_has_none() -> None:
    assert dialect_for(connections["default"]) is None


class Numbers(Dialect):
    """What a site may add."""


def test_a_site_may_add_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIALECTS, "numbers", f"{__name__}.Numbers")
    dialect: Any = dialect_for(SimpleNamespace(vendor="numbers"))  # type: ignore[arg-type]
    assert type(dialect) is Numbers
    assert dialect.reached({"log": 1}, {"log": 1})
    assert not dialect.reached({"log": 2}, {"log": 1})
    assert dialect.system(answers(), Identity("", "", 0)) == ""
    with pytest.raises(NotImplementedError):
        dialect.report(answers(), server(), 0)
    with pytest.raises(NotImplementedError):
        dialect.read((), server(), 0)
    with pytest.raises(NotImplementedError):
        dialect.identify(answers(), ("", 0), 0)


# Merging


def test_the_order_in_which_positions_are_merged_does_not_matter() -> None:
    drawn = random.Random(1)
    for _ in range(200):
        positions = [
            {
                drawn.choice(["", OPTIONAL]) + log: drawn.randrange(5)
                for log in drawn.sample(["0-1", "5-1", "7-2"], drawn.randrange(1, 4))
            }
            for _ in range(3)
        ]
        one, two, three = positions
        left = merge_positions(merge_positions(one, two), three)
        right = merge_positions(one, merge_positions(three, two))
        assert left == right
        dialect = MySQL()
        for known in ({"0-1": 4, "5-1": 4, "7-2": 4}, {"0-1": 2, "5-1": 3, "7-2": 1}):
            if dialect.reached(left or {}, known):
                assert all(dialect.reached(position, known) for position in positions)


def test_a_replica_needs_what_either_needs() -> None:
    assert merge_positions({"0-1": 3, "?5-1": 2}, {"0-1": 2, "5-1": 1}) == {"0-1": 3, "5-1": 2}
    assert merge_positions(None, {"0-1": 3}) == {"0-1": 3}
    assert merge_positions({"0-1": 3}, {}) == {"0-1": 3}


def test_pins_of_two_timelines_end_by_time() -> None:
    old, new = Pin(100.0, 0.0, {"ff-1": 9}), Pin(105.0, 0.0, {"ff-2": 3})
    assert old.merge(new) == new.merge(old) == Pin(105.0, 100.0, {"ff-2": 3})
