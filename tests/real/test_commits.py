"""The position of a commit: of raw transactions, of other aliases, and of late writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.signals import request_finished
from django.db import connections, transaction
from django.http import HttpResponse
from django.test import override_settings

from pinning_middleware import is_pinned, pin_keys
from pinning_middleware.scopes.scope import enter
from pinning_middleware.servers.budget import READ_BUDGET, read_budget
from pinning_middleware.testing import capture_reads
from tests.app.models import Book
from tests.conftest import Visit

from .conftest import (
    Asked,
    PostgreSQL,
    as_databases,
    entries_of,
    pin_in,
    position_in,
    probe_replicas,
    server_for,
    titles,
    unrelated_scope,
    write,
)

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}
INSERT = "INSERT INTO app_book (title) VALUES ('new')"
INSERTED = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint"
FLUSHED = "SELECT (pg_current_wal_lsn() - '0/0')::bigint"


def point_of(token: str | None) -> int:
    (point,) = position_in(token).values()
    return int(point)


def run(alias: str, *statements: str) -> None:
    with connections[alias].cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


# Transactions by BEGIN and COMMIT

TRANSACTIONS = {
    "begin": (("BEGIN", INSERT), "COMMIT"),
    "start transaction": (("START TRANSACTION", INSERT), "END"),
    "comment": (("/* one */ begin", INSERT), "/* two */ commit"),
    "savepoint": (("BEGIN", "SAVEPOINT s", INSERT, "RELEASE SAVEPOINT s"), "COMMIT"),
    "rolled back to savepoint": (
        ("BEGIN", INSERT, "SAVEPOINT s", INSERT, "ROLLBACK TO SAVEPOINT s"),
        "COMMIT",
    ),
    "one string": ((f"BEGIN; {INSERT}",), "COMMIT"),
    "chain": (("BEGIN", INSERT, "COMMIT AND CHAIN", INSERT), "COMMIT"),
}


def test_write_in_a_thread_that_has_spent_the_budget_of_a_read_has_a_position(
    pg: PostgreSQL,
) -> None:
    with unrelated_scope() as scope:
        read_budget.spend(READ_BUDGET)
        run("pg", INSERT)
        assert position_in(scope.token)


FORMS = pytest.mark.parametrize("form", TRANSACTIONS)


@FORMS
def test_position_of_raw_transaction_includes_its_commit(pg: PostgreSQL, form: str) -> None:
    """Also if the token was asked for before, which must not hold the position of the commit."""
    before, end = TRANSACTIONS[form]
    with unrelated_scope() as scope:
        run("pg", *before)
        asked_before = scope.token
        inserted = pg["pg"].execute(INSERTED)[0][0]
        run("pg", end)
        committed = pg["pg"].execute(FLUSHED)[0][0]
        point = point_of(scope.token)
    assert pin_in(asked_before).position is None
    # The record of the commit itself has 34 bytes or more.
    assert point > inserted
    assert point >= committed
    assert point_of(scope.token) == point


@pytest.mark.parametrize("form", list(TRANSACTIONS))
def test_position_of_raw_transaction_without_an_earlier_token_includes_its_commit(
    pg: PostgreSQL, form: str
) -> None:
    before, end = TRANSACTIONS[form]
    with unrelated_scope() as scope:
        run("pg", *before)
        inserted = pg["pg"].execute(INSERTED)[0][0]
        run("pg", end)
    assert point_of(scope.token) > inserted


@FORMS
def test_replica_that_has_replayed_up_to_the_commit_does_not_serve_the_pin(
    pg: PostgreSQL, form: str
) -> None:
    """Replay is paused between the last statement of the transaction and its commit."""
    before, end = TRANSACTIONS[form]
    with unrelated_scope() as scope:
        run("pg", *before)
        assert scope.token
        # Flushes the log.
        pg["pg"].execute("SELECT pg_logical_emit_message(true, '', 'flush')")
        pg.wait_for()
        pg.pause()
        run("pg", end)
    written = sorted(Book.objects.using("pg").values_list("title", flat=True))
    assert titles(scope.token) == written != []
    assert server_for(scope.token) == "pg"
    pg.resume()
    assert titles(scope.token) == written
    probe_replicas()
    assert server_for(scope.token) in REPLICAS


def test_position_of_raw_transaction_in_view_includes_its_commit(
    pg: PostgreSQL, visit: Visit
) -> None:
    inserted = []

    def act(request: Any) -> None:
        run("pg", "BEGIN", INSERT)
        inserted.append(pg["pg"].execute(INSERTED)[0][0])
        run("pg", "COMMIT")

    visit(act)
    assert point_of(visit.browser.cookies["pinning"].value) > inserted[0]


def test_position_without_autocommit_includes_the_commit(pg: PostgreSQL) -> None:
    connection = connections["pg"]
    connection.set_autocommit(False)
    try:
        with unrelated_scope() as scope:
            run("pg", INSERT)
            assert pin_in(scope.token).position is None
            inserted = pg["pg"].execute(INSERTED)[0][0]
            connection.commit()
            assert point_of(scope.token) > inserted
    finally:
        connection.set_autocommit(True)


def test_raw_transaction_that_is_rolled_back_ends(pg: PostgreSQL) -> None:
    with unrelated_scope() as scope:
        run("pg", "BEGIN", INSERT)
        assert pin_in(scope.token).position is None
        run("pg", "ROLLBACK")
        assert position_in(scope.token)
    pg.wait_for()
    assert titles(scope.token) == []


def test_raw_transaction_ends_with_a_commit_that_fails(pg: PostgreSQL) -> None:
    """By a deferred constraint; PostgreSQL has rolled it back."""
    with unrelated_scope():
        run("pg", "BEGIN")
        with pytest.raises(Exception, match="violates foreign key"):
            run("pg", "INSERT INTO app_book (title, author_id) VALUES ('new', 999999)", "COMMIT")
    with unrelated_scope(), capture_reads() as reads:
        Book.objects.count()
    assert [read.role for read in reads] == ["replica"]


# Another alias that resolves to the primary


@pytest.fixture
def direct(pg: PostgreSQL) -> Iterator[str]:
    """An alias outside the pool of `site`, with the server and the database of its primary."""
    site, one, two = entries_of(pg.cluster).values()
    with (
        as_databases({"site": site, "r1": one, "r2": two, "direct": dict(site)}),
        override_settings(PINNING_REPLICAS={"site": ["r1", "r2"]}),
    ):
        enter(None)
        yield "direct"


WRITES: dict[str, Callable[[str], Any]] = {
    "ORM": lambda alias: Book.objects.using(alias).create(title="new"),
    "bulk": lambda alias: Book.objects.using(alias).bulk_create([Book(title="new")]),
    "raw": lambda alias: run(alias, INSERT),
    "raw transaction": lambda alias: run(alias, "BEGIN", INSERT, "COMMIT"),
    "atomic": lambda alias: transaction.atomic(using=alias)(lambda: run(alias, INSERT))(),
}


@pytest.mark.parametrize("way", WRITES)
def test_write_through_another_alias_of_the_primary_pins_the_pool(
    pg: PostgreSQL, direct: str, way: str
) -> None:
    pg.pause()
    with unrelated_scope() as scope:
        inserted = pg["pg"].execute(INSERTED)[0][0]
        WRITES[way](direct)
        assert is_pinned("site")
        assert Book.objects.count() == 1
    assert point_of(scope.token) > inserted
    assert titles(scope.token) == ["new"]
    pg.resume()
    probe_replicas()
    assert server_for(scope.token) in ("r1", "r2")


def test_write_through_another_alias_of_the_primary_sets_the_cookie(
    pg: PostgreSQL, direct: str, visit: Visit
) -> None:
    pg.pause()
    visit(lambda request: WRITES["ORM"](direct))
    assert visit(lambda request: Book.objects.count()) == 1


def test_open_transaction_of_another_alias_of_the_primary_has_no_position_yet(
    pg: PostgreSQL, direct: str
) -> None:
    with unrelated_scope() as scope:
        with transaction.atomic(using=direct):
            run(direct, INSERT)
            assert pin_in(scope.token).position is None
            inserted = pg["pg"].execute(INSERTED)[0][0]
        assert point_of(scope.token) > inserted


def test_read_through_another_alias_of_the_primary_leaves_no_pin(
    pg: PostgreSQL, direct: str
) -> None:
    with unrelated_scope() as scope:
        assert Book.objects.using(direct).count() == 0
    assert scope.token is None


# Writes after the response

STORES = {
    "cookie": ["pinning_middleware.stores.CookieStore"],
    "header": ["pinning_middleware.stores.HeaderStore"],
    "cache": ["pinning_middleware.stores.CookieStore", "pinning_middleware.stores.CacheStore"],
}
NUMBER = 100


def user_key(request: Any) -> str:
    return "7"


@pytest.fixture(params=["closer", "request_finished"])
def late(request: pytest.FixtureRequest, visit: Visit) -> Iterator[Callable[..., None]]:
    """Return a function that makes a request and runs an action after its response."""
    receivers = []

    def run_late(action: Callable[[], Any], during: Callable[[], Any] = bool) -> None:
        def act(unused: Any) -> HttpResponse:
            during()
            response = HttpResponse()
            if request.param == "closer":
                response._resource_closers.append(action)  # type: ignore[attr-defined]
            return response

        def receive(**unused: Any) -> None:
            action()

        if request.param == "request_finished":
            request_finished.connect(receive)
            receivers.append(receive)
        visit.browser.get(f"/{visit.kind}/{visit._do(act)}/")
        while receivers:
            request_finished.disconnect(receivers.pop())

    yield run_late
    while receivers:
        request_finished.disconnect(receivers.pop())


def write_often() -> None:
    for number in range(NUMBER):
        run("pg", f"INSERT INTO app_book (title) VALUES ('{number}')")


@pytest.fixture
def probes(pg: PostgreSQL, asked: Asked) -> Callable[[], int]:
    """Return a function that returns the number of probes of the primary since its last call."""
    write()
    probe_replicas()
    asked.all.clear()

    def count() -> int:
        found = asked.by_requests.count("pg")
        asked.all.clear()
        return found

    return count


@pytest.mark.parametrize("store", ["cookie", "header"])
def test_late_writes_that_no_store_can_keep_do_not_probe_the_primary(
    late: Callable[..., None], probes: Callable[[], int], store: str
) -> None:
    with override_settings(PINNING_STORES=STORES[store]):
        late(write_often)
    assert Book.objects.using("pg").count() == NUMBER + 1
    assert probes() == 0


@pytest.fixture
def kept() -> Iterator[None]:
    """Keep the pins of late writes in the cache, under the user."""
    with override_settings(PINNING_STORES=STORES["cache"], PINNING_USER_KEY=f"{__name__}.user_key"):
        yield


@pytest.mark.usefixtures("pg", "kept")
def test_late_writes_probe_the_primary_once_for_each_commit(
    late: Callable[..., None], probes: Callable[[], int]
) -> None:
    late(write_often)
    assert probes() == NUMBER


@pytest.mark.usefixtures("pg", "kept")
def test_late_writes_probe_the_primary_once_for_each_commit_beside_that_of_the_response(
    late: Callable[..., None], probes: Callable[[], int]
) -> None:
    late(write_often, during=lambda: run("pg", INSERT))
    assert probes() == NUMBER + 1


@pytest.mark.usefixtures("pg", "kept")
@pytest.mark.parametrize("way", ["atomic", "nested", "raw"])
def test_late_writes_of_one_transaction_probe_the_primary_once(
    late: Callable[..., None], probes: Callable[[], int], way: str
) -> None:
    def in_atomic() -> None:
        with transaction.atomic(using="pg"):
            write_often()

    def in_nested() -> None:
        with transaction.atomic(using="pg"):
            for _ in range(10):
                with transaction.atomic(using="pg"):
                    run("pg", INSERT)

    def in_raw() -> None:
        run("pg", "BEGIN")
        write_often()
        run("pg", "COMMIT")

    late({"atomic": in_atomic, "nested": in_nested, "raw": in_raw}[way])
    assert probes() == 1


@pytest.mark.usefixtures("pg", "kept")
def test_late_reads_do_not_probe_the_primary(
    late: Callable[..., None], probes: Callable[[], int]
) -> None:
    late(lambda: [Book.objects.using("pg").count() for _ in range(10)])
    assert probes() == 0


@pytest.mark.usefixtures("pg", "kept")
def test_late_write_pins_the_next_request_of_the_user(
    pg: PostgreSQL, late: Callable[..., None], visit: Visit
) -> None:
    pg.pause()
    late(write_often)
    visit.browser.cookies.clear()
    assert visit(lambda request: Book.objects.count()) == NUMBER


def test_late_writes_with_pinned_keys_probe_the_primary_once_for_each_commit(
    late: Callable[..., None], probes: Callable[[], int]
) -> None:
    """The cookie cannot keep them, but the cache keeps the pins of keys."""
    late(write_often, during=lambda: pin_keys("key"))
    # One more for the keys of the response.
    assert probes() == NUMBER + 1
