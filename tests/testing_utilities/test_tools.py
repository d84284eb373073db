"""Tests of pinning_middleware.testing."""

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
from asgiref.sync import async_to_sync
from django.db import connections, transaction
from django.db.models.signals import post_init, post_save, pre_save
from django.test import override_settings

from pinning_middleware import (
    ignore_writes,
    no_failover,
    pin_this_request,
    pinning_scope,
    use_primary,
    use_replica,
)
from pinning_middleware.pins import Pin, PinKey
from pinning_middleware.pytest_plugin import _marked
from pinning_middleware.routing.replica_set import ReplicaSet
from pinning_middleware.stores import cache as cache_store
from pinning_middleware.testing import (
    LostUpdate,
    PinningAssertions,
    PrimaryForbidden,
    ReplicaForbidden,
    StaleRead,
    advance_window,
    assert_num_reads,
    assert_reads_from,
    capture_reads,
    forbid_primary,
    forbid_replicas,
    forbid_stale_reads,
    isolated_pins,
    replicas,
)
from pinning_middleware.testing.clock import reset_window
from pinning_middleware.testing.reads import tables_of
from pinning_middleware.utils import counters
from tests.app.models import Author, Book, Tag
from tests.conftest import Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@pytest.fixture(autouse=True)
def as_before(named: Callable[..., None]) -> Iterator[None]:
    named()
    yield
    replicas.reset()
    reset_window()
    assert counters.observers == counters.write_observers == []


# Recording reads


def test_capture_reads_alias_role_reason_and_model() -> None:
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
def test_assert_reads_from_reason_of_the_decision(act: Callable[[], Any], reason: str) -> None:
    with pinning_scope():
        act()
        with assert_reads_from("replica" if reason == "round_robin" else "primary", reason):
            Book.objects.get(pk=1)
            Book.objects.get(pk=1)


def test_capture_reads_reason_after_a_transaction() -> None:
    """A transaction between two reads does not change the reason of the second one."""
    with pinning_scope(), capture_reads() as reads:
        Book.objects.get(pk=1)
        with transaction.atomic():
            Book.objects.get(pk=1)
        Book.objects.get(pk=1)
    assert [read.reason for read in reads] == ["round_robin", "transaction", "round_robin"]


@override_settings(PINNING_PRIMARY_MODELS=["app.Author"])
def test_assert_reads_from_primary_model() -> None:
    with pinning_scope():
        with assert_reads_from("primary", "primary_model"):
            Author.objects.get(pk=1)
        with assert_reads_from("replica", "round_robin"):
            Book.objects.get(pk=1)


@override_settings(PINNING_ENABLED=False)
def test_assert_reads_from_disabled_site() -> None:
    with assert_reads_from("default", "disabled"):
        Book.objects.get(pk=1)


def test_assert_num_reads_of_requests(visit: Visit) -> None:
    with assert_num_reads(primary=0, replica=1):
        visit(lambda request: Book.objects.get(pk=1))
    with assert_num_reads(primary=1, replica=0):
        visit(lambda request: Book.objects.get(pk=1), method="post")


def test_capture_reads_of_another_thread() -> None:
    def read() -> None:
        Book.objects.get(pk=1)
        connections.close_all()

    with capture_reads() as reads:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert [read.role for read in reads] == ["replica"]


def test_capture_reads_ignores_aliases_outside_pools() -> None:
    with capture_reads() as reads:
        Book.objects.using("elsewhere").count()
    assert reads == []


def test_read_by_a_method_of_the_driver_is_captured() -> None:
    with capture_reads() as reads, connections["replica1"].cursor() as cursor:
        cursor.executescript("SELECT 1 FROM app_book")
    assert [(read.served, read.model) for read in reads] == [("replica1", Book)]


def test_capture_reads_nested() -> None:
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
        ("SELECT * FROM a, b.c AS d, ONLY e f WHERE g, h", ["a", "c", "e"]),
        ("SELECT extract(year FROM a), b FROM c ORDER BY d, e LIMIT 1, 2", ["a", "c"]),
        ("SELECT 1", []),
    ],
)
def test_tables_of(sql: str, tables: list[str]) -> None:
    assert tables_of(sql) == tables


# Assertions


def test_assert_reads_from_lists_other_reads() -> None:
    def read() -> None:
        with assert_reads_from("primary"), pinning_scope():
            with use_primary():
                Book.objects.get(pk=1)
            Book.objects.get(pk=1)

    with pytest.raises(
        AssertionError, match=r"1 of 2 reads .* primary.*\n.*round_robin.*app\.Book.*"
    ):
        read()


def test_assert_reads_from_fails_without_reads() -> None:
    with pytest.raises(AssertionError, match="No reads, expected"), assert_reads_from("replica"):
        pass


def test_assert_reads_from_fails_for_another_reason() -> None:
    with (
        pytest.raises(AssertionError, match="for the reason 'caught_up'"),
        assert_reads_from("replica", "caught_up"),
    ):
        Book.objects.get(pk=1)


def test_assert_reads_from_unknown_alias() -> None:
    with pytest.raises(ValueError, match="'replica9' is not one of"), assert_reads_from("replica9"):
        pass


def test_assert_num_reads_fails_for_another_number() -> None:
    with (
        pytest.raises(AssertionError, match="1 reads from the replica, 2 expected"),
        assert_num_reads(replica=2),
    ):
        Book.objects.get(pk=1)


def test_assert_reads_from_propagates_errors() -> None:
    with pytest.raises(KeyError), assert_reads_from("replica"):
        raise KeyError


def test_pinning_assertions_resets_replicas_and_windows() -> None:
    class Base:
        def run(self, result: Any = None) -> str:
            replicas.lag("replica1")
            replicas.take_down("replica2")
            advance_window(5)
            return "ran"

    class Mixed(PinningAssertions, Base):
        pass

    assert Mixed().run() == "ran"
    assert ReplicaSet.behind_in_tests == ReplicaSet.unreachable_in_tests == frozenset()
    assert counters.write_observers == []


# Forbidding reads and writes


def test_forbid_primary_raises_for_reads_and_writes() -> None:
    with forbid_primary(), pinning_scope():
        Book.objects.get(pk=1)
    with pytest.raises(PrimaryForbidden, match="test_tools"), forbid_primary(), use_primary():
        Book.objects.get(pk=1)
    with forbid_primary(reads=False), use_primary():
        Book.objects.get(pk=1)
    with pytest.raises(PrimaryForbidden, match="INSERT"), forbid_primary(reads=False):
        Tag.objects.bulk_create([Tag(name="never")])
    assert not Tag.objects.using("default").filter(name="never").exists()


def test_forbid_replicas_raises_for_reads() -> None:
    with pytest.raises(ReplicaForbidden), forbid_replicas():
        Book.objects.get(pk=1)
    with forbid_replicas(), use_primary():
        Book.objects.get(pk=1)


def test_forbid_replicas_raises_caught_error_at_the_end() -> None:
    def suppress_error() -> None:
        with contextlib.suppress(AssertionError):
            Book.objects.get(pk=1)

    with pytest.raises(ReplicaForbidden), forbid_replicas():
        suppress_error()


# Lag


def lose_pin(alias: str) -> None:
    """Lose a pin, and read from a replica without the write."""
    with forbid_stale_reads(), pinning_scope():
        with ignore_writes():
            Tag.objects.create(name="a")
        Tag.objects.using(alias).count()


def test_forbid_stale_reads_names_both_lines() -> None:
    replicas.lag("replica1", "replica2")
    place = r"test_tools\.py:\d+"
    with pytest.raises(StaleRead, match=f"{place} reads app_tag.*written at .*{place}"):
        lose_pin("replica1")


def test_forbid_stale_reads_ignores_other_tables_and_replicas() -> None:
    replicas.lag("replica1")
    lose_pin("replica2")
    with forbid_stale_reads(), pinning_scope():
        Author.objects.using("replica1").count()
    with pytest.raises(StaleRead):
        lose_pin("replica1")
    replicas.catch_up("replica1")
    lose_pin("replica1")


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
def test_forbid_stale_reads_unparsed_write(sql: str) -> None:
    """The write may be to any table that the statement mentions."""
    replicas.lag("replica1")
    with ignore_writes(), connections["default"].cursor() as cursor:
        cursor.execute(sql)
    with forbid_stale_reads(), pinning_scope():
        Author.objects.using("replica1").count()
        Tag.objects.filter(book=1).using("replica2").count()
    with pytest.raises(StaleRead, match="reads app_tag"), forbid_stale_reads():
        Tag.objects.using("replica1").count()


def test_forbid_stale_reads_allows_use_replica() -> None:
    replicas.lag()
    with forbid_stale_reads(), pinning_scope():
        with ignore_writes():
            Tag.objects.create(name="a")
        with use_replica(), assert_reads_from("replica", "use_replica"):
            Tag.objects.count()


def test_forbid_stale_reads_raises_caught_error_at_the_end() -> None:
    def suppress_error() -> None:
        with forbid_stale_reads(), contextlib.suppress(StaleRead):
            with ignore_writes():
                Tag.objects.create(name="a")
            Tag.objects.using("replica1").count()

    replicas.lag()
    with pytest.raises(StaleRead):
        suppress_error()


def test_forbid_stale_reads_ignores_writes_before_the_lag() -> None:
    with ignore_writes():
        Tag.objects.create(name="a")
    with replicas.lag(), forbid_stale_reads(), pinning_scope():
        Tag.objects.count()


# Lost updates


def read_and_save(**options: Any) -> None:
    book = Book.objects.get(pk=1)
    book.title = "changed"
    book.save(**options)


def test_forbid_stale_reads_lost_update_names_both_lines() -> None:
    place = r"test_tools\.py:\d+"
    message = f"{place} saves all fields of app.Book 1, which .*{place} has read from replica"
    with (
        replicas.lag(),
        pytest.raises(LostUpdate, match=message),
        forbid_stale_reads(),
        pinning_scope(),
    ):
        read_and_save()
    assert Book.objects.using("default").get(pk=1).title != "changed"


def test_forbid_stale_reads_lost_update_of_use_replica() -> None:
    with replicas.lag(), pytest.raises(LostUpdate), forbid_stale_reads(), use_replica():
        read_and_save()


def test_forbid_stale_reads_lost_update_of_a_related_instance() -> None:
    with replicas.lag(), pytest.raises(LostUpdate, match=r"app\.Author"), forbid_stale_reads():
        Book.objects.select_related("author").get(pk=1).author.save()


def test_forbid_stale_reads_lost_update_in_async_code() -> None:
    async def act() -> None:
        book = await Book.objects.aget(pk=1)
        await book.asave()

    with replicas.lag(), pytest.raises(LostUpdate), forbid_stale_reads(), pinning_scope():
        async_to_sync(act)()


def test_forbid_stale_reads_allows_safe_saves() -> None:
    with replicas.lag(), forbid_stale_reads():
        with pinning_scope():
            read_and_save(update_fields=["title"])
        with pinning_scope(), use_primary():
            read_and_save()
        with pinning_scope(), transaction.atomic():
            book = Book.objects.select_for_update().get(pk=1)
            book.save()


def test_forbid_stale_reads_allows_new_instances() -> None:
    with replicas.lag(), forbid_stale_reads(), pinning_scope():
        list(Author.objects.all())
        author = Author(name="new")
        author.save()
        author.save()


def test_forbid_stale_reads_allows_save_after_refresh_from_the_primary() -> None:
    with replicas.lag(), forbid_stale_reads(), pinning_scope():
        book = Book.objects.get(pk=1)
        with use_primary():
            book.refresh_from_db()
        book.save()


def test_forbid_stale_reads_allows_saves_without_lag() -> None:
    refresh = Book.refresh_from_db
    with forbid_stale_reads(), pinning_scope():
        read_and_save()
    with replicas.lag("replica1"), forbid_stale_reads(), pinning_scope():
        book = Book.objects.using("replica2").get(pk=1)
        book.save()
    assert Book.refresh_from_db is refresh
    assert not any(signal.has_listeners(Book) for signal in (post_init, pre_save, post_save))


# Isolation


def test_isolated_pins_hides_earlier_pins() -> None:
    pins = {PinKey("default"): Pin(time.time() + 15)}
    cache_store.save_pins("user", ["1"], pins)
    with isolated_pins():
        assert cache_store.load_pins("user", ["1"]) == {}
        cache_store.save_pins("user", ["2"], pins)
        assert cache_store.load_pins("user", ["2"])
        with isolated_pins():
            assert cache_store.load_pins("user", ["2"]) == {}
        assert cache_store.load_pins("user", ["2"])
    assert cache_store.load_pins("user", ["1"])
    assert cache_store.load_pins("user", ["2"]) == {}


def test_pinning_assertions_isolates_pins_of_tests() -> None:
    class Base:
        def run(self, result: Any = None) -> int:
            found = len(cache_store.load_pins("user", ["1"]))
            cache_store.save_pins("user", ["1"], {PinKey("default"): Pin(time.time() + 15)})
            return found

    class Mixed(PinningAssertions, Base):
        pass

    assert [Mixed().run(), Mixed().run()] == [0, 0]


@pytest.mark.parametrize("number", [1, 2])
def test_plugin_isolates_pins_of_tests(number: int, pinning_replicas: Any) -> None:
    assert cache_store.load_pins("user", ["1"]) == {}
    cache_store.save_pins("user", ["1"], {PinKey("default"): Pin(time.time() + 15)})
    assert cache_store.key_prefix


# Replicas that lag


def test_lag_exceeds_max_lag() -> None:
    with override_settings(PINNING_MAX_LAG=5), replicas.lag("replica1"):
        for _ in range(3):
            with pinning_scope(), assert_reads_from("replica2"):
                Book.objects.get(pk=1)


def test_lag_exceeds_max_lag_of_use_replica() -> None:
    with replicas.lag("replica1"), pinning_scope(), use_replica(max_lag=3):
        assert where() != "replica1"


def test_catch_up_copies_the_rows() -> None:
    replicas.lag()
    Tag.objects.create(name="new")
    with no_failover():
        assert not Tag.objects.using("replica1").filter(name="new").exists()
    replicas.catch_up()
    with no_failover():
        assert Tag.objects.using("replica1").filter(name="new").exists()
    assert replicas.lagging == frozenset()


def test_reset_resumes_the_others_if_one_replica_cannot_be_resumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []

    def command(self: Any, alias: str, *statements: Any) -> None:
        tried.append(alias)
        if alias == "replica2":
            raise RuntimeError("it did not run the statement")

    replicas.lag()
    monkeypatch.setattr(type(replicas), "_command", command)
    with pytest.raises(RuntimeError):
        replicas.reset()
    assert set(tried) == {"replica1", "replica2"}
    assert not replicas.lagging
    assert where() in {"replica1", "replica2"}


def test_catch_up_fails_inside_a_transaction() -> None:
    with transaction.atomic("replica1"), pytest.raises(RuntimeError, match="TransactionTestCase"):
        replicas.catch_up("replica1")


@pytest.mark.parametrize(
    "act", [replicas.lag, replicas.take_down, replicas.catch_up, replicas.bring_up]
)
def test_replicas_unknown_alias(act: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="'default' is not an alias in"):
        act("default")


# Unreachable replicas


def test_take_down_removes_replicas_from_rotation() -> None:
    with replicas.take_down("replica1"):
        for _ in range(3):
            with pinning_scope(), assert_reads_from("replica2", "round_robin"):
                Book.objects.get(pk=1)
        replicas.take_down("replica2")
        with pinning_scope(), assert_reads_from("primary", "no_replica"):
            Book.objects.get(pk=1)
        # Other settings create new pools; the replicas stay unreachable.
        with (
            override_settings(PINNING_BALANCE_BY="query"),
            pinning_scope(),
            assert_reads_from("primary", "no_replica"),
        ):
            Book.objects.get(pk=1)
        replicas.bring_up("replica2")
    seen = set()
    for _ in range(4):
        with pinning_scope(), assert_reads_from("replica") as reads:
            Book.objects.get(pk=1)
        seen.add(reads[0].alias)
    assert seen == {"replica1", "replica2"}


# Windows


def test_advance_window_ends_a_pin(visit: Visit) -> None:
    visit(lambda request: Tag.objects.create(name="a"), method="post")
    assert visit() == "default"
    advance_window(14)
    assert visit() == "default"
    advance_window(1)
    assert visit() != "default"


def test_advance_window_changes_no_other_clock() -> None:
    before, ticks = time.time(), time.monotonic()
    advance_window(1000)
    assert time.time() - before < 900
    assert time.monotonic() - ticks < 900


def test_advance_window_with_freezegun(visit: Visit, clock: Any) -> None:
    visit(lambda request: Tag.objects.create(name="a"), method="post")
    clock.tick(10)
    assert visit() == "default"
    advance_window(5)
    assert visit() != "default"


def test_advance_window_with_time_machine(visit: Visit) -> None:
    with time_machine.travel(dt.datetime(2026, 1, 1, tzinfo=dt.UTC), tick=False) as at:
        visit(lambda request: Tag.objects.create(name="a"), method="post")
        at.shift(10)
        assert visit() == "default"
        advance_window(5)
        assert visit() != "default"


def test_advance_window_outside_scopes_selects_the_next_replica() -> None:
    first = where()
    assert where() == first
    advance_window(15)
    assert where() != first


def test_advance_window_negative_number() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        advance_window(-1)


# The pytest plugin


def test_plugin_imports_neither_django_nor_the_package() -> None:
    code = (
        "import sys, pinning_middleware.pytest_plugin;"
        "print([name for name in sys.modules if name.split('.')[0] in ('django', 'asgiref')"
        " or name.startswith('pinning_middleware.') and not name.endswith('pytest_plugin')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


@pytest.mark.pinning(lag="replica1")
def test_marker_makes_a_replica_lag() -> None:
    assert replicas.lagging == {"replica1"}


@pytest.mark.pinning("replica1")
def test_marker_positional_argument() -> None:
    assert replicas.lagging == {"replica1"}


@pytest.mark.pinning(lag=["replica1", "replica2"], forbid_stale_reads=False)
def test_marker_list_of_replicas() -> None:
    assert replicas.lagging == {"replica1", "replica2"}
    with pytest.raises(TypeError, match="a list of aliases"), _marked("replica1", "replica2"):
        pass


def test_replica_that_could_be_paused_is_resumed_if_another_could_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[tuple[str, str]] = []

    def command(self: Any, alias: str, statements: dict[str, str], *checks: Any) -> None:
        commands.append((alias, statements["postgresql"]))
        if alias == "replica2":
            raise RuntimeError("it did not run the statement")

    monkeypatch.setattr(type(replicas), "_command", command)
    with pytest.raises(RuntimeError), _marked(["replica1", "replica2"]):
        pass
    assert commands[-1] == ("replica1", "SELECT pg_wal_replay_resume()")
    assert not replicas.lagging


def test_fixtures(
    capture_reads: Any, django_assert_reads_from: Any, django_assert_num_reads: Any
) -> None:
    elsewhere = django_assert_reads_from("replica")
    with capture_reads() as reads, elsewhere, django_assert_num_reads(replica=1):
        Book.objects.get(pk=1)
    assert len(reads) == 1


@pytest.mark.django_db(transaction=True, databases="__all__")
def test_isolated_pins_hides_what_the_thread_has_written() -> None:
    Book.objects.create(title="of another test")
    assert not is_replica(where())
    with isolated_pins():
        assert is_replica(where())
        Book.objects.create(title="of this test")
        assert not is_replica(where())
    with isolated_pins():
        assert is_replica(where())


@pytest.mark.django_db(transaction=True, databases="__all__")
def test_isolated_pins_keeps_the_scope_around_it() -> None:
    with pinning_scope(isolated=True):
        Book.objects.create(title="x")
        with isolated_pins():
            assert where() == "default"
