"""Dialects: identities, positions and error codes of each database, without a server."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import OperationalError, connections

from pinning_middleware.pins import Points, Position, merge_positions
from pinning_middleware.servers.dialects import (
    DIALECTS,
    Dialect,
    Driver,
    PositionUnavailable,
    Query,
    Row,
    dialect_for,
)
from pinning_middleware.servers.dialects.mysql import (
    MySQL,
    parse_gtids,
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


def query_returning(*results: Any) -> Query:
    """Return a query function that returns these rows, or raises these errors, in order."""
    left = list(results)

    def query(sql: str) -> Row:
        result = left.pop(0)
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[no-any-return]

    return query


def server(system: str = "", lacks_timeline_privilege: bool = False) -> Server:
    created = Server(Identity("now", "127.0.0.1", 5432), system)
    created.lacks_timeline_privilege = lacks_timeline_privilege
    return created


def reached(dialect: Dialect, wanted: Points, replayed: Points, *optional: str) -> bool:
    """Compare positions, with the logs of the wanted one that are optional."""
    return dialect.reached(Position(wanted, frozenset(optional)), replayed)


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
def test_lsn_is_parsed_as_a_64_bit_integer(text: str, number: int) -> None:
    assert parse_lsn(text) == number


def test_lsns_are_ordered_as_numbers() -> None:
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
def test_end_of_record_excludes_page_headers(inserted: int, end: int) -> None:
    assert end_of_record(inserted) == end


def postgresql(*row: Any, strategy: int = LSN, lacks_timeline_privilege: bool = False) -> Report:
    return PostgreSQL().read(row, server("ff", lacks_timeline_privilege), strategy)


def test_postgresql_primary_reports_its_timeline_and_the_end_of_record() -> None:
    report = postgresql(False, "0/16018", "0000000A0000000000000001")
    assert report == Report(False, {"ff-10": 0x16018}, Position({"ff-10": 0x16000}))


def test_postgresql_replica_reports_the_timeline_of_its_receiver() -> None:
    assert postgresql(True, "0/3000060", "1") == Report(True, {"ff-1": 0x3000060})


def test_postgresql_replica_without_a_receiver_has_an_unknown_timeline() -> None:
    assert postgresql(True, "0/3000060", None) == Report(True, {"ff-": 0x3000060})


def test_timeline_is_hidden_on_a_replica_from_a_role_without_the_privilege() -> None:
    assert postgresql(True, "0/3000060", None, lacks_timeline_privilege=True).timeline_hidden
    assert not postgresql(True, "0/3000060", "1", lacks_timeline_privilege=True).timeline_hidden
    assert not postgresql(
        False, "0/3000060", "0000000100", lacks_timeline_privilege=True
    ).timeline_hidden


def test_postgresql_position_is_unavailable_without_a_replay_position() -> None:
    with pytest.raises(PositionUnavailable):
        postgresql(True, None, None)


def test_transaction_ids_are_compared_with_transaction_ids_of_one_timeline_only() -> None:
    primary = postgresql(False, "758", "0000000A0000000000000001", strategy=XID)
    replica = postgresql(True, "757", "10", strategy=XID)
    assert primary.written == Position({"ffx-10": 758})
    assert replica.replayed == {"ffx-10": 757}
    dialect = PostgreSQL()
    assert not dialect.reached(primary.written, replica.replayed)
    assert dialect.reached(primary.written, {"ffx-10": 758})
    for log in ("ff-10", "ffx-1", "ffx-", "ffx"):
        assert not dialect.reached(primary.written, {log: 99999})


def test_transaction_ids_without_a_timeline_are_comparable() -> None:
    primary = postgresql(False, "758", None, strategy=XID_ALONE)
    assert primary.written == Position({"ffx": 758})
    assert PostgreSQL().reached(
        primary.written, postgresql(True, "758", None, strategy=XID_ALONE).replayed
    )


@pytest.mark.parametrize(
    ("setting", "strategies"),
    [
        (True, (LSN, XID, XID_ALONE)),
        ("lsn", (LSN,)),
        ("xid", (XID, XID_ALONE)),
        ("gtid", ()),
        (False, ()),
    ],
)
def test_postgresql_strategies_follow_the_setting(
    setting: Any, strategies: tuple[int, ...]
) -> None:
    assert PostgreSQL().strategies(setting) == strategies


def test_postgresql_identity_without_a_strategy_has_no_report() -> None:
    query = query_returning(("2026-01-01 12:00:00.5+00", "10.0.0.7", 5432, 99, False))
    identification, row = PostgreSQL().identify(query, ("db", 6432), None)
    assert identification == (Identity("2026-01-01 12:00:00.5+00", "10.0.0.7", 5432), 99, True)
    assert row == ()


def test_postgresql_identity_over_a_unix_socket_uses_the_drivers_address() -> None:
    query = query_returning(("then", None, None, 99, True, True, "0/10", "1"))
    identification, row = PostgreSQL().identify(query, Driver("/run", 5433), LSN)
    assert identification.identity == Identity("then", "/run", 5433)
    assert not identification.lacks_timeline_privilege
    assert row == (True, "0/10", "1")


def test_postgresql_compares_within_one_timeline_of_one_cluster() -> None:
    dialect = PostgreSQL()
    assert reached(dialect, {"ff-1": 10}, {"ff-1": 10})
    assert not reached(dialect, {"ff-1": 11}, {"ff-1": 10})
    for other in ("ff-2", "ff-11", "fe-1", "ff-", ""):
        assert not reached(dialect, {"ff-1": 10}, {other: 99})
        assert not reached(dialect, {other: 10}, {"ff-1": 99})
    assert not reached(dialect, {"ff-1": 10}, {})


@pytest.mark.parametrize("attribute", ["sqlstate", "pgcode"])
def test_postgresql_error_code_is_read_from_both_drivers(attribute: str) -> None:
    error = OperationalError("conflict")
    assert PostgreSQL().error_code(error) is None
    error.__cause__ = type("DriverError", (Exception,), {attribute: "40001"})()
    assert PostgreSQL().error_code(error) == "40001"


@pytest.mark.parametrize(
    ("code", "is_lost", "is_retryable"),
    [
        ("40001", False, True),  # conflict with recovery
        ("40P01", False, True),  # deadlock with recovery
        ("57P01", True, True),
        ("57P03", True, True),
        ("57P04", False, True),  # database dropped on the primary
        ("08006", True, True),
        ("53300", False, True),  # too many connections
        ("53200", False, True),  # out of memory
        ("57014", False, False),  # statement timeout, cancel
        ("42P01", False, False),
        (None, False, False),
    ],
)
def test_postgresql_errors_are_classified(
    code: str | None, is_lost: bool, is_retryable: bool
) -> None:
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
def test_mariadb_gtids_are_parsed_by_domain_and_server(text: str, position: dict[str, int]) -> None:
    assert parse_mariadb(text) == position


def mariadb(*row: Any) -> Report:
    return MySQL().read(row, server("mariadb"), 0)


@pytest.mark.parametrize(
    ("own", "written", "position"),
    [
        ("0-1-8", "0-1-9", Position({"0-1": 9})),
        # The connection has not written to domain 5, so that domain is optional.
        ("0-1-8", "0-1-9,5-1-3", Position({"0-1": 9, "5-1": 3}, frozenset({"5-1"}))),
        # The connection has no last GTID, so every domain is required.
        ("", "0-1-9,5-1-3", Position({"0-1": 9, "5-1": 3})),
        # After a promotion, the log is that of the new server.
        ("0-1-8", "0-2-9", Position({"0-2": 9})),
    ],
)
def test_mariadb_primary_requires_the_domains_that_the_connection_wrote_to(
    own: str, written: str, position: Position
) -> None:
    assert mariadb("", written, 1, 0, own).written == position


@pytest.mark.parametrize(
    ("row", "is_replica"),
    [
        (("0-1-8", "", 2, 1), True),
        (("0-1-8", "0-1-8", 2, 0), True),
        # Promoted: it has written, and is not read-only.
        (("0-1-8", "0-2-9", 2, 0), False),
        (("0-1-8", "0-2-9", 2, 1), True),
        # Server 12, whose number ends with that of server 2.
        (("0-1-8", "0-12-9", 2, 0), True),
        # A primary that never replicated, or a replica without GTIDs.
        (("", "0-1-8", 1, 0), None),
    ],
)
def test_mariadb_role_is_read_from_gtids_and_read_only(
    row: tuple[Any, ...], is_replica: bool | None
) -> None:
    report = mariadb(*row, "")
    assert report.is_replica is is_replica
    assert report.replayed == parse_mariadb(row[0])


def test_mariadb_position_is_unavailable_without_gtids() -> None:
    with pytest.raises(PositionUnavailable):
        mariadb("", "", 1, 0, "")


@pytest.mark.parametrize(
    ("wanted", "replayed", "expected"),
    [
        (Position({"0-1": 8}), {"0-1": 8}, True),
        (Position({"0-1": 8}), {"0-1": 7}, False),
        (Position({"0-1": 8}), {}, False),
        # After a promotion another server's transaction has that number.
        (Position({"0-1": 8}), {"0-2": 9}, False),
        (Position({"0-1": 8}), {"0-1": 7, "0-2": 9}, False),
        (Position({"0-1": 8}), {"5-1": 9}, False),
        (Position({"0-1": 8, "5-1": 3}), {"0-1": 8}, False),
        (Position({"0-1": 8, "5-1": 3}), {"0-1": 8, "5-1": 3}, True),
        # An optional domain counts if the replica has it.
        (Position({"0-1": 8, "5-1": 3}, frozenset({"5-1"})), {"0-1": 8}, True),
        (Position({"0-1": 8, "5-1": 3}, frozenset({"5-1"})), {"0-1": 8, "5-1": 2}, False),
        (Position({"0-1": 8, "5-1": 3}, frozenset({"5-1"})), {"0-1": 8, "5-1": 3}, True),
        (Position({"0-1": 8, "5-1": 3}, frozenset({"5-1"})), {"0-1": 8, "5-2": 3}, False),
        (Position({"0-1": 8, "5-1": 3}, frozenset({"5-1"})), {"0-1": 8, "15-1": 1}, True),
    ],
)
def test_mariadb_compares_required_and_shared_domains(
    wanted: Position, replayed: Points, expected: bool
) -> None:
    assert MySQL().reached(wanted, replayed) is expected


def test_mariadb_compares_sequence_numbers_as_numbers() -> None:
    assert reached(MySQL(), {"0-1": 9}, {"0-1": 10})


# MySQL


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", {}),
        (f"{A}:1-5", {A: 5}),
        (f"{A}:1", {A: 1}),
        (f"{A}:1-5:9-12", {A: 5, f"{A}/9": 12}),
        (f"{A.upper()}:1-5,\n{B}:1-7", {A: 5, B: 7}),
        (f"{A}:7", {f"{A}/7": 7}),
        (f"{A}:5-9,{B}:1-2", {f"{A}/5": 9, B: 2}),
        # Each tag (8.3) is a log of its own.
        (f"{A}:1-5:backup:1-3", {A: 5, f"{A}:backup": 3}),
        (f"{A}:backup:1-3", {f"{A}:backup": 3}),
        (
            f"{A}:1-5:backup:2-3:x:1,{B}:1",
            {A: 5, f"{A}:backup/2": 3, f"{A}:x": 1, B: 1},
        ),
    ],
)
def test_mysql_gtids_are_parsed_by_interval(text: str, position: dict[str, int]) -> None:
    assert parse_gtids(text) == position


def mysql(
    executed: str, uuid: str, read_only: int, mode: str = "ON", group: str | None = None
) -> Report:
    return MySQL().read((executed, uuid, read_only, mode, group), server("mysql"), 0)


@pytest.mark.parametrize(
    ("executed", "position"),
    [
        (f"{A}:1-5", Position({A: 5})),
        # Number 9 has committed before those below it, or they were skipped.
        (f"{A}:1-5:9", Position({A: 5, f"{A}/9": 9})),
        # A former primary's log, or that of a group.
        (f"{A}:1-5,{B}:1-7", Position({A: 5, B: 7}, frozenset({B}))),
        (f"{B}:1-700", None),
        ("", None),
        (f"{A.upper()}:1-5:backup:1-3", Position({A: 5, f"{A}:backup": 3})),
    ],
)
def test_mysql_primary_requires_its_own_logs(executed: str, position: Any) -> None:
    assert mysql(executed, A, 0).written == position


def test_mysql_position_with_many_gaps_is_unavailable() -> None:
    executed = f"{A}:" + ":".join(str(n) for n in range(1, 40, 2))
    with pytest.raises(PositionUnavailable):
        mysql(executed, A, 0)
    assert mysql(executed, B, 1).replayed == parse_gtids(executed)


@pytest.mark.parametrize(
    ("read_only", "group", "is_replica"),
    [(0, f"{B},ON", False), (1, None, True), (0, f"{B},OFF", None)],
)
def test_mysql_role_and_position_in_a_group(
    read_only: int, group: str | None, is_replica: bool | None
) -> None:
    """All members write under the UUID of the group."""
    report = mysql(f"{B}:1-700:1001-1005", A, read_only, "ON", group)
    assert report.is_replica is is_replica
    points = {B: 700, f"{B}/1001": 1005}
    assert report.written == (None if is_replica else Position(points))


def test_mysql_position_is_unavailable_without_gtid_mode() -> None:
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
def test_mysql_role_is_read_from_gtids_and_read_only(
    row: tuple[str, str, int], is_replica: bool | None
) -> None:
    assert mysql(*row)[:2] == (is_replica, parse_gtids(row[0]))


def test_mysql_reached_requires_the_set_without_gaps() -> None:
    dialect = MySQL()
    assert reached(dialect, {A: 5}, parse_gtids(f"{A}:1-5"))
    assert reached(dialect, {A: 5}, parse_gtids(f"{A}:1-10,{B}:1-3"))
    assert not reached(dialect, {A: 6}, parse_gtids(f"{A}:1-5:7-9"))
    assert reached(dialect, {A: 5, f"{A}/8": 9}, parse_gtids(f"{A}:1-5:7-9"))
    assert reached(dialect, {A: 5, f"{A}/7": 8}, parse_gtids(f"{A}:1-9"))
    assert not reached(dialect, {f"{A}/7": 10}, parse_gtids(f"{A}:1-5:7-9"))
    assert not reached(dialect, {f"{A}/6": 8}, parse_gtids(f"{A}:1-5:7-9"))
    assert not reached(dialect, {A: 5}, parse_gtids(f"{B}:1-10"))
    assert not reached(dialect, {A: 5}, parse_gtids(f"{A}:7"))
    assert not reached(dialect, {f"{A}:backup": 2}, parse_gtids(f"{A}:1-10"))


@pytest.mark.parametrize("code", [2006, 2013, 1053, 1927, 2002])
def test_mysql_lost_connection_is_retryable(code: int) -> None:
    error = OperationalError(code, "gone")
    assert MySQL().error_code(error) in MySQL.retryable_errors


@pytest.mark.parametrize("error", [OperationalError(1317, "interrupted"), OperationalError(3024)])
def test_mysql_cancelled_query_is_not_retryable(error: OperationalError) -> None:
    assert MySQL().error_code(error) not in MySQL.retryable_errors


def test_mysql_error_without_a_number_has_no_code() -> None:
    assert MySQL().error_code(OperationalError()) is None
    assert MySQL().error_code(OperationalError("gone")) is None


# Choosing a dialect


@pytest.mark.parametrize("version", ["11.8.2-MariaDB-log", "5.5.5-10.11.19-MariaDB", ""])
def test_mariadb_is_identified_by_its_version(version: str) -> None:
    dialect = MySQL()
    rows: list[tuple[Any, ...]] = [] if version else [("11.8.2-MariaDB",)]
    query = query_returning(*rows, ("db1", 3306, 12, 7, 1700000000))
    identification, row = dialect.identify(query, Driver("", 0, version), None)
    assert identification.identity.started == "mariadb 7 1700000000"
    assert row == ()
    assert dialect.system(query_returning(), identification.identity) == "mariadb"


def test_mysql_is_identified_by_its_version() -> None:
    dialect = MySQL()
    query = query_returning(("db1", 3306, 12, A, 17, "x"))
    identification, row = dialect.identify(query, Driver("", 0, "9.7.4-2"), 0)
    assert identification == (Identity(f"mysql {A} 17", "db1", 3306), 12, False)
    assert row == ("x",)
    assert dialect.system(query_returning(), identification.identity) == "mysql"


def test_mysql_server_that_was_not_identified_has_no_position() -> None:
    with pytest.raises(PositionUnavailable):
        MySQL().report(query_returning(), server(""), 0)


@pytest.mark.parametrize(
    ("code", "is_refusal"),
    [(1142, True), (1305, True), (2013, False), (1040, False), (1317, False)],
)
def test_mysql_error_of_a_probe_is_a_refusal_unless_it_may_pass(
    code: int, is_refusal: bool
) -> None:
    assert MySQL().refuses_probe(OperationalError(code, "")) is is_refusal
    assert not MySQL().refuses_probe(OperationalError("gone"))


def test_mysql_and_mariadb_positions_are_compared_without_a_connection() -> None:
    """The server may not be reachable."""
    dialect = dialect_for(SimpleNamespace(vendor="mysql"))  # type: ignore[arg-type]
    assert dialect is not None
    assert dialect.connect_timeout == "connect_timeout"
    assert reached(dialect, {A: 5, f"{A}:backup": 1}, {A: 5, f"{A}:backup": 1})
    assert not reached(dialect, {A: 5}, {A: 4})
    assert not reached(dialect, {A: 5}, {B: 9})
    assert reached(dialect, {"0-1": 8, "5-1": 3}, {"0-1": 8}, "5-1")
    assert not reached(dialect, {"0-1": 8}, {"0-2": 9})


def test_dialect_is_created_once() -> None:
    connection: Any = SimpleNamespace(vendor="postgresql")
    assert type(dialect_for(connection)) is PostgreSQL
    assert dialect_for(connection) is dialect_for(connection)


def test_sqlite_has_no_dialect() -> None:
    assert dialect_for(connections["default"]) is None


class CustomDialect(Dialect):
    """A dialect as a site may add it, with the defaults of the base class."""


def test_custom_dialect_is_used_for_its_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIALECTS, "custom", f"{__name__}.CustomDialect")
    dialect: Any = dialect_for(SimpleNamespace(vendor="custom"))  # type: ignore[arg-type]
    assert type(dialect) is CustomDialect
    assert reached(dialect, {"log": 1}, {"log": 1})
    assert not reached(dialect, {"log": 2}, {"log": 1})
    assert dialect.system(query_returning(), Identity("", "", 0)) == ""


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("identify", (query_returning(), ("", 0), 0)),
        ("report", (query_returning(), server(), 0)),
        ("read", ((), server(), 0)),
        ("error_code", (ValueError(),)),
    ],
)
def test_dialect_without_a_required_method_raises_not_implemented_error(
    method: str, arguments: tuple[Any, ...]
) -> None:
    with pytest.raises(NotImplementedError, match=rf"must provide an? {method}\(\) method"):
        getattr(CustomDialect(), method)(*arguments)


# Merging positions


def test_merged_position_requires_what_each_position_requires() -> None:
    generator = random.Random(1)
    dialect = MySQL()

    def draw() -> Position:
        logs = generator.sample(["0-1", "5-1", "7-2"], generator.randrange(1, 4))
        optional = frozenset(log for log in logs if generator.random() < 0.5)
        return Position({log: generator.randrange(5) for log in logs}, optional)

    for _ in range(1000):
        one, other = draw(), draw()
        both = merge_positions(one, other)
        assert both is not None
        logs = generator.sample(["0-1", "5-1", "7-2"], generator.randrange(4))
        replayed = {log: generator.randrange(5) for log in logs}
        if dialect.reached(both, replayed):
            assert dialect.reached(one, replayed)
            assert dialect.reached(other, replayed)


@pytest.mark.parametrize(
    ("points", "other", "expected"),
    [
        ({"ff-2": 1}, {"ff-1": 9}, True),
        ({"ff-1": 9, "ff-2": 1}, {"ff-1": 9}, True),
        ({"ff-10": 1}, {"ff-1": 9, "ff-9": 9}, True),
        ({"ff-1": 9}, {"ff-1": 1}, False),
        ({"ff-1": 9}, {"ff-2": 1}, False),
        # A promoted server has points of both timelines.
        ({"ff-2": 9}, {"ff-1": 9, "ff-2": 1}, False),
        ({"ff-2": 9}, {"ff-1": 9, "ff-3": 1}, False),
        ({"ff-2": 9}, {"ee-1": 9}, False),
        ({"ff-2": 9}, {}, False),
    ],
)
def test_later_timeline_than_all_of_a_server_supersedes_it(
    points: Points, other: Points, expected: bool
) -> None:
    assert PostgreSQL().supersedes(points, other) is expected


@pytest.mark.parametrize(
    ("read_only", "is_replica"),
    [(0, False), (1, True), ("OFF", False), ("ON", True), ("NO_LOCK", True)],
)
def test_read_only_of_mariadb_is_a_number_or_a_text(read_only: int | str, is_replica: bool) -> None:
    """It is a text from MariaDB 12.0.1 on."""
    row = ("0-1-5", "0-2-9", 2, read_only, "")
    assert MySQL().read(row, server("mariadb"), 0).is_replica is is_replica
