"""Positions of every family, as far as they need no server."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import OperationalError, connections

from pinning_middleware.pins import OPTIONAL, Pin, merge_positions
from pinning_middleware.positions import FAMILIES, Positions, base, family_of
from pinning_middleware.positions.mysql import (
    MariaDB,
    MySQL,
    parse_gtids,
    parse_last,
    parse_mariadb,
)
from pinning_middleware.positions.postgresql import PostgreSQL, end_of_record, parse_lsn

A, B = "3e11fa47-71ca-11e1-9e33-c80aa9429562", "4f22fb58-82db-22f2-af44-d91bb0530673"


class Answers:
    """A connection whose server gives these answers, in turn, and keeps the questions."""

    mysql_is_mariadb = True
    pg_version = 180000
    vendor = "mysql"

    def __init__(self, *rows: Any, names: tuple[str, ...] = ()) -> None:
        self.rows = list(rows)
        self.description = [(name,) for name in names]
        self.asked: list[str] = []

    @contextmanager
    def cursor(self) -> Iterator[Any]:
        yield SimpleNamespace(
            execute=self.execute,
            fetchone=lambda: self.rows.pop(0),
            fetchall=lambda: self.rows.pop(0),
            description=self.description,
        )

    def execute(self, sql: str) -> None:
        self.asked.append(sql)
        if isinstance(self.rows[0], Exception):
            raise self.rows.pop(0)


def ask(method: Any, *rows: Any, **kwargs: Any) -> Any:
    return method(Answers(*rows, **kwargs))


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


def postgresql(*rows: Any) -> Any:
    return PostgreSQL(), Answers(*rows)


def test_postgresql_current() -> None:
    family, answers = postgresql(("0/16018", "0000000A", 7000000000000000001))
    assert family.current(answers) == {"6124fee993bc0001-10": 0x16000}


def test_postgresql_report() -> None:
    family, answers = postgresql((True, "0/3000060", 1, 255), (False, None, None, 255))
    assert family.report(answers) == (True, {"ff-1": 0x3000060})
    assert family.report(answers) == (False, {})


def test_postgresql_of_a_plain_role() -> None:
    family, answers = postgresql((True, "0/3000060", None, 255))
    report = family.report(answers)
    assert not family.is_certain(report.position)
    # The primary says afterwards what the log is.
    known = family.ascertain(report.position, {"ff-2": 0x3000060})
    assert family.is_certain(known)
    assert known == {"ff-2": 0x3000060}
    # Of another cluster, or ahead of this primary, it is not this primary's.
    for primary in ({"fe-2": 0x3000060}, {"ff-2": 0x3000060 - 100}):
        assert not family.reached({"ff-2": 1}, family.ascertain(report.position, primary))
    # The end of the primary's last record may be said without the page's header.
    assert family.ascertain({"ff-": 8192 + 40}, {"ff-2": 8192}) == {"ff-2": 8192 + 40}


def test_postgresql_compares_within_a_timeline_of_a_cluster() -> None:
    family = PostgreSQL()
    assert family.reached({"ff-1": 10}, {"ff-1": 10})
    assert not family.reached({"ff-1": 11}, {"ff-1": 10})
    for other in ("ff-2", "ff-11", "fe-1", "ff-", ""):
        assert not family.reached({"ff-1": 10}, {other: 99})
        assert not family.reached({other: 10}, {"ff-1": 99})
    assert not family.reached({"ff-1": 10}, {})


def test_postgresql_behind() -> None:
    family, answers = postgresql((1.5,), (None,), (-0.001,))
    assert [family.behind(answers) for _ in range(3)] == [1.5, None, 0.0]


@pytest.mark.parametrize(
    ("seconds", "milliseconds"), [(0.05, 50), (2, 2000), (0.0004, 1), (0.0, 1), (0.0015, 2)]
)
def test_postgresql_19_waits_itself(seconds: float, milliseconds: int) -> None:
    """At or under half a millisecond it would wait for ever."""
    family, answers = postgresql(("success",))
    answers.pg_version = 190000
    assert family.wait(answers, {"ff-1": 0x10306EE20}, seconds)
    assert answers.asked == [
        "WAIT FOR LSN '1/306EE20' WITH "
        f"(MODE 'standby_replay', TIMEOUT '{milliseconds}ms', NO_THROW)"
    ]


def test_postgresql_18_is_asked_again_and_again() -> None:
    family, answers = postgresql()
    assert not family.wait(answers, {"ff-1": 1}, 1)
    answers.pg_version = 190000
    assert not family.wait(answers, {"ff-1": 1, "ff-2": 1}, 1)
    assert answers.asked == []


@pytest.mark.parametrize("attribute", ["sqlstate", "pgcode"])
def test_postgresql_error_codes_of_both_drivers(attribute: str) -> None:
    error = OperationalError("conflict")
    assert PostgreSQL().error_code(error) is None
    error.__cause__ = type("DriverError", (Exception,), {attribute: "40001"})()
    assert PostgreSQL().error_code(error) == "40001"


def test_postgresql_passing_errors() -> None:
    assert {"40001", "57P01", "57P02", "57P03"} <= PostgreSQL.passing_errors
    assert "57014" not in PostgreSQL.passing_errors


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


@pytest.mark.parametrize(
    ("own", "written", "position"),
    [
        ("0-1-8", "0-1-9", {"0-1": 9}),
        # What others wrote in another domain does not count for a replica that has none of it.
        ("0-1-8", "0-1-9,5-1-3", {"0-1": 9, "?5-1": 3}),
        # A connection that does not know which domain it wrote to.
        ("", "0-1-9,5-1-3", {"0-1": 9, "5-1": 3}),
        ("", "", None),
        # After a promotion: by this server.
        ("0-1-8", "0-2-9", {"0-2": 9}),
    ],
)
def test_mariadb_current(own: str, written: str, position: Any) -> None:
    assert ask(MariaDB().current, (own, written)) == position


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
        # A primary that never replicated.
        (("", "0-1-8", 1, 0), False),
        (("", "", 1, 1), False),
    ],
)
def test_mariadb_report(row: tuple[Any, ...], is_replica: bool) -> None:
    report = ask(MariaDB().report, row)
    assert report.is_replica is is_replica
    assert report.position == parse_mariadb(row[0])


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
    assert MariaDB().reached(wanted, known) is reached


def test_mariadb_compares_as_numbers() -> None:
    assert MariaDB().reached({"0-1": 9}, {"0-1": 10})


def status(*seconds: int | None) -> Any:
    rows = [("", number) for number in seconds]
    return ask(MariaDB().behind, rows, names=("Connection_name", "Seconds_Behind_Master"))


def test_mariadb_behind() -> None:
    assert status(3) == 3.0
    assert status(3, 7) == 7.0
    # Stopped, of several sources one stopped, none at all.
    assert status(None) is None
    assert status(3, None) is None
    assert status() is None


def test_mariadb_behind_without_the_right_to_ask() -> None:
    assert ask(MariaDB().behind, OperationalError(1227, "Access denied")) is None
    with pytest.raises(OperationalError):
        ask(MariaDB().behind, OperationalError(2013, "Lost connection"))


def test_mariadb_waits_for_what_it_must_have() -> None:
    answers = Answers((0,))
    assert MariaDB().wait(answers, {"0-1": 8, "?5-1": 3, "7-1": 2}, 0.05)  # type: ignore[arg-type]
    assert answers.asked == ["SELECT MASTER_GTID_WAIT('0-1-8,7-1-2', 0.050)"]
    assert not MariaDB().wait(answers, {"?5-1": 3}, 0.05)  # type: ignore[arg-type]


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
    assert ask(MySQL().current, (executed, A)) == position


def test_mysql_under_group_replication_tells_none() -> None:
    """All members write under the group's UUID."""
    assert ask(MySQL().current, (f"{B}:1-700", A)) is None


@pytest.mark.parametrize(
    ("row", "is_replica"),
    [
        ((f"{A}:1-5", B, 1), True),
        ((f"{A}:1-5", B, 0), True),
        ((f"{A}:1-5,{B}:1", B.upper(), 0), False),
        ((f"{A}:1-5,{B}:1", B, 1), True),
        (("", B, 1), False),
    ],
)
def test_mysql_report(row: tuple[Any, ...], is_replica: bool) -> None:
    assert ask(MySQL().report, row) == (is_replica, parse_gtids(row[0]))


def test_mysql_reached() -> None:
    family = MySQL()
    assert family.reached({A: 5}, parse_gtids(f"{A}:1-5"))
    assert family.reached({A: 5}, parse_gtids(f"{A}:1-10,{B}:1-3"))
    assert not family.reached({A: 6}, parse_gtids(f"{A}:1-5:7-9"))
    assert not family.reached({A: 5}, parse_gtids(f"{B}:1-10"))
    assert not family.reached({A: 5}, parse_gtids(f"{A}:7"))
    assert not family.reached({f"{A}:backup": 2}, parse_gtids(f"{A}:1-10"))


@pytest.mark.parametrize(("seconds", "limit"), [(0.05, "0.050"), (2, "2.000"), (0.0001, "0.001")])
def test_mysql_waits(seconds: float, limit: str) -> None:
    answers = Answers((0,))
    assert MySQL().wait(answers, {A: 5, f"{A}:backup": 2}, seconds)  # type: ignore[arg-type]
    gtids = f"{A}:1-5,{A}:backup:1-2"
    assert answers.asked == [f"SELECT WAIT_FOR_EXECUTED_GTID_SET('{gtids}', {limit})"]


def test_mysql_cannot_tell_how_long_it_is_behind() -> None:
    assert ask(MySQL().behind) is None


@pytest.mark.parametrize("code", [2006, 2013, 1053, 1927, 2002])
def test_lost_connections_of_mysql(code: int) -> None:
    error = OperationalError(code, "gone")
    assert MySQL().error_code(error) in MySQL.passing_errors


@pytest.mark.parametrize("error", [OperationalError(1317, "interrupted"), OperationalError(3024)])
def test_a_cancelled_query_is_none_of_them(error: OperationalError) -> None:
    assert MySQL().error_code(error) not in MySQL.passing_errors


def test_errors_without_a_number() -> None:
    assert MySQL().error_code(OperationalError()) is None
    assert MySQL().error_code(OperationalError("gone")) is None


# Families


def test_mariadb_and_mysql_share_a_vendor() -> None:
    mariadb: Any = Answers(("0-1-8", "0-1-9"), ("0-1-8", "", 2, 1), (0,))
    family = family_of(mariadb)
    assert family is not None
    assert family.current(mariadb) == {"0-1": 9}
    assert family.report(mariadb) == (True, {"0-1": 8})
    assert family.wait(mariadb, {"0-1": 8}, 1)
    assert "MASTER_GTID_WAIT" in mariadb.asked[-1]

    mysql: Any = Answers((f"{A}:1-5", A), (f"{A}:1-5", B, 1), (0,))
    mysql.mysql_is_mariadb = False
    assert family_of(mysql) is family
    assert family.current(mysql) == {A: 5}
    assert family.report(mysql) == (True, {A: 5})
    assert family.behind(mysql) is None
    assert family.wait(mysql, {A: 5}, 1)
    assert "WAIT_FOR_EXECUTED_GTID_SET" in mysql.asked[-1]


def test_comparing_and_choosing_take_no_connection() -> None:
    """The server may not be there."""
    family = family_of(SimpleNamespace(vendor="mysql"))  # type: ignore[arg-type]
    assert family is not None
    assert family.connect_timeout == "connect_timeout"
    assert family.reached({A: 5, f"{A}:backup": 1}, {A: 5, f"{A}:backup": 1})
    assert not family.reached({A: 5}, {A: 4})
    assert not family.reached({A: 5}, {B: 9})
    assert family.reached({"0-1": 8, "?5-1": 3}, {"0-1": 8})
    assert not family.reached({"0-1": 8}, {"0-2": 9})


def test_postgresql_is_one_object() -> None:
    answers: Any = Answers()
    answers.vendor = "postgresql"
    assert type(family_of(answers)) is PostgreSQL
    assert family_of(answers) is family_of(answers)


def test_sqlite_has_none() -> None:
    assert family_of(connections["default"]) is None


class Numbers(Positions):
    """What a site may add."""


def test_a_site_may_add_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "numbers", "tests.test_positions_pure.Numbers")
    answers: Any = SimpleNamespace(vendor="numbers")
    family = family_of(answers)
    assert type(family) is Numbers
    assert family.reached({"log": 1}, {"log": 1})
    assert not family.reached({"log": 2}, {"log": 1})
    assert family.is_certain({"log": 1})
    assert family.ascertain({"log": 1}, {}) == {"log": 1}
    assert family.behind(answers) is None
    assert not family.wait(answers, {"log": 1}, 1)
    for question in (family.current, family.report, family.error_code):
        with pytest.raises(NotImplementedError):
            question(answers)


def test_a_statement_without_a_row() -> None:
    assert base.fetch(Answers(None), "SELECT") == ()  # type: ignore[arg-type]


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
        family = MariaDB()
        for known in ({"0-1": 4, "5-1": 4, "7-2": 4}, {"0-1": 2, "5-1": 3, "7-2": 1}):
            if family.reached(left or {}, known):
                assert all(family.reached(position, known) for position in positions)


def test_a_replica_needs_what_either_needs() -> None:
    assert merge_positions({"0-1": 3, "?5-1": 2}, {"0-1": 2, "5-1": 1}) == {"0-1": 3, "5-1": 2}
    assert merge_positions(None, {"0-1": 3}) == {"0-1": 3}
    assert merge_positions({"0-1": 3}, {}) == {"0-1": 3}


def test_pins_of_two_timelines_end_by_time() -> None:
    old, new = Pin(100.0, 0.0, {"ff-1": 9}), Pin(105.0, 0.0, {"ff-2": 3})
    assert old.merge(new) == new.merge(old) == Pin(105.0, 100.0, {"ff-2": 3})
