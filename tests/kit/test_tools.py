"""The tools of pinning_middleware.testing, inside this project's own tests."""

from __future__ import annotations

import contextlib
import datetime as dt
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import time_machine
from django.db import connections, transaction
from django.test import override_settings

from pinning_middleware import (
    ignore_writes,
    no_failover,
    pin_this_request,
    pinning_scope,
    use_primary,
    use_replica,
)
from pinning_middleware.pytest_plugin import _marked
from pinning_middleware.routing.replica_set import Nodes
from pinning_middleware.testing import (
    PinningAssertions,
    PrimaryForbidden,
    ReplicaForbidden,
    StaleRead,
    assert_num_reads,
    assert_reads_from,
    capture_reads,
    forbid_primary,
    forbid_replicas,
    forbid_stale_reads,
    replicas,
    step,
)
from pinning_middleware.testing.clock import reset_step
from pinning_middleware.testing.reads import tables_of
from pinning_middleware.utils import counters
from tests.app.models import Author, Book, Tag
from tests.conftest import Visit, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@pytest.fixture(autouse=True)
def as_before(named: Callable[..., None]) -> Iterator[None]:
    named()
    yield
    replicas.reset()
    reset_step()
    assert counters.observers == counters.write_observers == []


# What is recorded


def test_each_read_tells_where_and_why() -> None:
    with pinning_scope(), capture_reads() as reads:
        Book.objects.get(pk=1)
        with use_primary():
            Author.objects.get(pk=1)
        (other,) = {"replica1", "replica2"} - {reads[0].alias}
        Tag.objects.using(other).get(pk=1)
        with transaction.atomic():
            Book.objects.count()
    assert [(read.role, read.reason, read.model) for read in reads] == [
        ("replica", "round_robin", Book),
        ("primary", "use_primary", Author),
        ("replica", "explicit", Tag),
        ("primary", "transaction", Book),
    ]
    assert reads[0].alias == reads[0].served
    assert reads[0].place.startswith(f"{__file__}:")
    assert reads[2].alias == other


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda: Tag.objects.create(name="a"), "wrote"),
        (pin_this_request, "manual"),
        (lambda: None, "round_robin"),
    ],
)
def test_the_reason_is_that_of_the_decision(act: Callable[[], Any], reason: str) -> None:
    with pinning_scope():
        act()
        with assert_reads_from("replica" if reason == "round_robin" else "primary", reason):
            Book.objects.get(pk=1)
            Book.objects.get(pk=1)


def test_a_kept_answer_keeps_its_reason() -> None:
    """A transaction between two reads of a replica is not what the second one goes by."""
    with pinning_scope(), capture_reads() as reads:
        Book.objects.get(pk=1)
        with transaction.atomic():
            Book.objects.get(pk=1)
        Book.objects.get(pk=1)
    assert [read.reason for read in reads] == ["round_robin", "transaction", "round_robin"]


@override_settings(PINNING_PRIMARY_MODELS=["app.Author"])
def test_a_model_of_the_primary() -> None:
    with pinning_scope():
        with assert_reads_from("primary", "primary_model"):
            Author.objects.get(pk=1)
        with assert_reads_from("replica", "round_robin"):
            Book.objects.get(pk=1)


@override_settings(PINNING_ENABLED=False)
def test_a_site_that_is_switched_off() -> None:
    with assert_reads_from("default", "disabled"):
        Book.objects.get(pk=1)


def test_reads_inside_requests(visit: Visit) -> None:
    with assert_num_reads(primary=0, replica=1):
        visit(lambda request: Book.objects.get(pk=1))
    with assert_num_reads(primary=1, replica=0):
        visit(lambda request: Book.objects.get(pk=1), method="post")


def test_another_thread_is_seen() -> None:
    def read() -> None:
        Book.objects.get(pk=1)
        connections.close_all()

    with capture_reads() as reads:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert [read.role for read in reads] == ["replica"]


def test_aliases_outside_of_pools_are_not() -> None:
    with capture_reads() as reads:
        Book.objects.using("elsewhere").count()
    assert reads == []


def test_blocks_nest() -> None:
    with capture_reads() as outer:
        with capture_reads() as inner:
            Book.objects.get(pk=1)
        Book.objects.get(pk=1)
    assert (len(outer), len(inner)) == (2, 1)


@pytest.mark.parametrize(
    ("sql", "tables"),
    [
        ('SELECT "a"."id" FROM "a" INNER JOIN "b" ON 1', ["a", "b"]),
        ("SELECT * FROM public.Things t LEFT JOIN `x`.`y`", ["things", "y"]),
        ("SELECT 'no FROM here' FROM [t]", ["t"]),
        ("SELECT 1 FROM a /* FROM b */ JOIN/* it's */c -- FROM d", ["a", "c"]),
        ("SELECT 1", []),
    ],
)
def test_tables(sql: str, tables: list[str]) -> None:
    assert tables_of(sql) == tables


# What is asserted


def test_reads_elsewhere_are_listed() -> None:
    def read() -> None:
        with assert_reads_from("primary"), pinning_scope():
            with use_primary():
                Book.objects.get(pk=1)
            Book.objects.get(pk=1)

    with pytest.raises(AssertionError, match=r"1 of 2 reads .* primary.*\n.*turn.*app\.Book.*"):
        read()


def test_no_read_at_all_fails() -> None:
    with pytest.raises(AssertionError, match="no read at all"), assert_reads_from("replica"):
        pass


def test_another_reason_fails() -> None:
    with (
        pytest.raises(AssertionError, match="reason 'position'"),
        assert_reads_from("replica", "caught_up"),
    ):
        Book.objects.get(pk=1)


def test_an_unknown_alias_is_said() -> None:
    with pytest.raises(ValueError, match="'replica9' is none of"), assert_reads_from("replica9"):
        pass


def test_other_numbers_fail() -> None:
    with (
        pytest.raises(AssertionError, match="1 reads from the replica, 2 expected"),
        assert_num_reads(replica=2),
    ):
        Book.objects.get(pk=1)


def test_what_the_block_raises_is_not_hidden() -> None:
    with pytest.raises(KeyError), assert_reads_from("replica"):
        raise KeyError


def test_a_mixin_undoes_what_its_test_did() -> None:
    class Base:
        def run(self, result: Any = None) -> str:
            replicas.lag("replica1")
            replicas.kill("replica2")
            step(5)
            return "ran"

    class Mixed(PinningAssertions, Base):
        pass

    assert Mixed().run() == "ran"
    assert Nodes.held_back == Nodes.cut_off == frozenset()
    assert counters.write_observers == []


# What is forbidden


def test_the_primary_is_forbidden() -> None:
    with forbid_primary(), pinning_scope():
        Book.objects.get(pk=1)
    with pytest.raises(PrimaryForbidden, match="test_tools"), forbid_primary(), use_primary():
        Book.objects.get(pk=1)
    with forbid_primary(reads=False), use_primary():
        Book.objects.get(pk=1)
    with pytest.raises(PrimaryForbidden, match="INSERT"), forbid_primary(reads=False):
        Tag.objects.bulk_create([Tag(name="never")])
    assert not Tag.objects.using("default").filter(name="never").exists()


def test_replicas_are_forbidden() -> None:
    with pytest.raises(ReplicaForbidden), forbid_replicas():
        Book.objects.get(pk=1)
    with forbid_replicas(), use_primary():
        Book.objects.get(pk=1)


def test_what_the_code_caught_is_raised_at_the_end() -> None:
    def careless() -> None:
        with contextlib.suppress(AssertionError):
            Book.objects.get(pk=1)

    with pytest.raises(ReplicaForbidden), forbid_replicas():
        careless()


# Lag


def forgetful(alias: str) -> None:
    """Lose a pin, and read where what was written is missing."""
    with forbid_stale_reads(), pinning_scope():
        with ignore_writes():
            Tag.objects.create(name="a")
        Tag.objects.using(alias).count()


def test_a_stale_read_names_both_lines() -> None:
    replicas.lag("replica1", "replica2")
    place = r"test_tools\.py:\d+"
    with pytest.raises(StaleRead, match=f"{place} reads app_tag.*written at .*{place}"):
        forgetful("replica1")


def test_other_tables_and_other_replicas_are_not_stale() -> None:
    replicas.lag("replica1")
    forgetful("replica2")
    with forbid_stale_reads(), pinning_scope():
        Author.objects.using("replica1").count()
    with pytest.raises(StaleRead):
        forgetful("replica1")
    replicas.catch_up("replica1")
    forgetful("replica1")


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE app_tag SET name = 'a;b'",
        "UPDATE app_tag SET name = 'a--b'",
        "UPDATE app_tag SET name = 'a' /*app='it',route='app_author'*/",
        "WITH x AS (SELECT 1) INSERT INTO app_tag (name) SELECT 'app_author' FROM x",
        'UPDATE "app_tag" AS t SET name = 2',
        "UPDATE main.app_tag AS t SET name = 2",
    ],
)
def test_a_write_whose_table_is_not_plain_to_see(sql: str) -> None:
    """Each table that it names may be the one."""
    replicas.lag("replica1")
    with ignore_writes(), connections["default"].cursor() as cursor:
        cursor.execute(sql)
    with forbid_stale_reads(), pinning_scope():
        Author.objects.using("replica1").count()
        Tag.objects.filter(book=1).using("replica2").count()
    with pytest.raises(StaleRead, match="reads app_tag"), forbid_stale_reads():
        Tag.objects.using("replica1").count()


def test_use_replica_may_be_stale() -> None:
    replicas.lag()
    with forbid_stale_reads(), pinning_scope():
        with ignore_writes():
            Tag.objects.create(name="a")
        with use_replica(), assert_reads_from("replica", "use_replica"):
            Tag.objects.count()


def test_a_stale_read_that_the_code_caught_is_raised_at_the_end() -> None:
    def careless() -> None:
        with forbid_stale_reads(), contextlib.suppress(StaleRead):
            with ignore_writes():
                Tag.objects.create(name="a")
            Tag.objects.using("replica1").count()

    replicas.lag()
    with pytest.raises(StaleRead):
        careless()


def test_what_was_written_before_the_lag_is_there() -> None:
    with ignore_writes():
        Tag.objects.create(name="a")
    with replicas.lag(), forbid_stale_reads(), pinning_scope():
        Tag.objects.count()


def test_a_lagging_replica_is_out_under_max_lag() -> None:
    with override_settings(PINNING_MAX_LAG=5), replicas.lag("replica1"):
        for _ in range(3):
            with pinning_scope(), assert_reads_from("replica2"):
                Book.objects.get(pk=1)


def test_use_replica_minds_it() -> None:
    with replicas.lag("replica1"), pinning_scope(), use_replica(max_lag=3):
        assert where() != "replica1"


def test_catching_up_brings_the_rows() -> None:
    replicas.lag()
    Tag.objects.create(name="new")
    assert not Tag.objects.using("replica1").filter(name="new").exists()
    replicas.catch_up()
    with no_failover():
        assert Tag.objects.using("replica1").filter(name="new").exists()
    assert replicas.lagging == frozenset()


def test_a_copy_into_a_transaction_is_refused() -> None:
    with transaction.atomic("replica1"), pytest.raises(RuntimeError, match="TransactionTestCase"):
        replicas.catch_up("replica1")


@pytest.mark.parametrize("act", [replicas.lag, replicas.kill, replicas.catch_up, replicas.revive])
def test_unknown_replicas_are_said(act: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="'default' is no replica"):
        act("default")


# Death


def test_the_dead_serve_nobody() -> None:
    with replicas.kill("replica1"):
        for _ in range(3):
            with pinning_scope(), assert_reads_from("replica2", "round_robin"):
                Book.objects.get(pk=1)
        replicas.kill("replica2")
        with pinning_scope(), assert_reads_from("primary", "no_replica"):
            Book.objects.get(pk=1)
        # Other settings are other pools, and the dead stay dead.
        with (
            override_settings(PINNING_BALANCE_BY="query"),
            pinning_scope(),
            assert_reads_from("primary", "no_replica"),
        ):
            Book.objects.get(pk=1)
        replicas.revive("replica2")
    seen = set()
    for _ in range(4):
        with pinning_scope(), assert_reads_from("replica") as reads:
            Book.objects.get(pk=1)
        seen.add(reads[0].alias)
    assert seen == {"replica1", "replica2"}


# Windows


def test_a_step_ends_a_window(visit: Visit) -> None:
    visit(lambda request: Tag.objects.create(name="a"), method="post")
    assert visit() == "default"
    step(14)
    assert visit() == "default"
    step(1)
    assert visit() != "default"


def test_a_step_moves_no_other_clock() -> None:
    before, ticks = time.time(), time.monotonic()
    step(1000)
    assert time.time() - before < 900
    assert time.monotonic() - ticks < 900


def test_a_step_beside_freezegun(visit: Visit, clock: Any) -> None:
    visit(lambda request: Tag.objects.create(name="a"), method="post")
    clock.tick(10)
    assert visit() == "default"
    step(5)
    assert visit() != "default"


def test_a_step_beside_time_machine(visit: Visit) -> None:
    with time_machine.travel(dt.datetime(2026, 1, 1, tzinfo=dt.UTC), tick=False) as at:
        visit(lambda request: Tag.objects.create(name="a"), method="post")
        at.shift(10)
        assert visit() == "default"
        step(5)
        assert visit() != "default"


def test_a_thread_outside_scopes_takes_its_next_turn_after_a_step() -> None:
    first = where()
    assert where() == first
    step(15)
    assert where() != first


def test_no_step_back() -> None:
    with pytest.raises(ValueError, match="not back"):
        step(-1)


# The plugin


def test_the_plugin_imports_nothing_that_is_not_used() -> None:
    code = (
        "import sys, pinning_middleware.pytest_plugin;"
        "print([name for name in sys.modules if name.split('.')[0] in ('django', 'asgiref')"
        " or name.startswith('pinning_middleware.') and not name.endswith('pytest_plugin')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


@pytest.mark.pinning(lag="replica1")
def test_the_marker_makes_a_replica_lag() -> None:
    assert replicas.lagging == {"replica1"}


@pytest.mark.pinning("replica1")
def test_the_marker_needs_no_keyword() -> None:
    assert replicas.lagging == {"replica1"}


@pytest.mark.pinning(lag=["replica1", "replica2"], forbid_stale_reads=False)
def test_the_marker_takes_several() -> None:
    assert replicas.lagging == {"replica1", "replica2"}
    with pytest.raises(TypeError, match="a list of them"):
        _marked("replica1", "replica2")


def test_the_fixtures(
    capture_reads: Any, django_assert_reads_from: Any, django_assert_num_reads: Any
) -> None:
    elsewhere = django_assert_reads_from("replica")
    with capture_reads() as reads, elsewhere, django_assert_num_reads(replica=1):
        Book.objects.get(pk=1)
    assert len(reads) == 1
