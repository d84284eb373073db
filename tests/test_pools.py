"""The routing rules: the first match wins, tested with the rules it precedes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connections, transaction
from django.test import override_settings
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import (
    is_pinned,
    no_failover,
    pin_this_request,
    pinning_scope,
    propagate_scope,
    unpin_this_request,
    use_primary,
    use_replica,
)
from pinning_middleware.pins import PoolKey
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.scope import current_scope
from pinning_middleware.testing import capture_reads
from tests.app.models import Author, Book
from tests.conftest import Browser, Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@pytest.fixture
def atomic_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)


@pytest.fixture
def mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configure the replicas like `TEST = {"MIRROR": "default"}`, after their pool was made."""
    pools()
    name = connections.settings["default"]["NAME"]
    for alias in ("replica1", "replica2"):
        connections[alias].close()
        monkeypatch.setitem(connections.settings[alias], "NAME", name)


def all_verbs(request: Any) -> str:
    with use_replica():
        return where()


# Rule 1: no replica


@pytest.mark.parametrize(
    "settings",
    [
        {"PINNING_ENABLED": False},
        {"PINNING_REPLICAS": []},
        {"PINNING_REPLICAS": {}},
        {"PINNING_REPLICAS": {"default": []}},
    ],
)
def test_rule_1_pool_without_replicas_uses_the_primary(
    visit: Visit, settings: dict[str, Any]
) -> None:
    """Rule 1 takes precedence over `use_replica`."""
    with override_settings(**settings):
        assert visit() == "default"
        assert visit(all_verbs) == "default"
    assert is_replica(visit())


def test_disabled_setting_uses_the_primary_and_stores_nothing(visit: Visit) -> None:
    with override_settings(PINNING_ENABLED=False):
        visit(lambda request: Book.objects.create())
        visit(lambda request: pin_this_request())
        assert not visit.browser.cookies


# Rule 2: overrides


def test_rule_2_wins_over_a_transaction(visit: Visit) -> None:
    def action(request: Any) -> str:
        with transaction.atomic(), use_replica():
            return where()

    assert is_replica(visit(action))


def test_rule_2_wins_over_a_write_and_a_method(visit: Visit) -> None:
    def action(request: Any) -> tuple[str, str]:
        Book.objects.create()
        with use_replica():
            return where(), all_verbs(request)

    assert all(map(is_replica, visit(action, "post")))


def test_rule_2_wins_over_the_pin_of_an_earlier_request(visit: Visit) -> None:
    visit(lambda request: Book.objects.create())
    assert visit() == "default"
    assert is_replica(visit(all_verbs))


@pytest.mark.usefixtures("named")
def test_rule_2_wins_over_the_instance_hint(visit: Visit, named: Callable[..., None]) -> None:
    named()

    def action(request: Any) -> str:
        book = Book.objects.get()
        with use_primary():
            return book.author.name

    assert visit(action) == "default"


# Rule 3: transactions and locking reads


def in_transaction(request: Any) -> tuple[str, str]:
    with transaction.atomic():
        return where(), where()


def test_rule_3_reads_in_a_transaction_use_the_primary(visit: Visit) -> None:
    assert visit(in_transaction) == ("default", "default")


def test_transaction_without_a_write_does_not_pin(visit: Visit) -> None:
    def action(request: Any) -> tuple[str, ...]:
        return (where(), *in_transaction(request), where())

    before, inside, _, after = visit(action)
    assert inside == "default"
    assert before == after
    assert is_replica(before)
    assert not visit.browser.cookies


def test_transaction_on_another_database_is_ignored(visit: Visit) -> None:
    def action(request: Any) -> str:
        with transaction.atomic(using="users"):
            return where()

    assert is_replica(visit(action))


def test_disabled_autocommit_is_a_transaction(browser: Browser, do: Any) -> None:
    seen: list[str] = []

    def action(request: Any) -> str:
        seen.append(where())
        transaction.set_autocommit(False)
        try:
            seen.append(where())
        finally:
            transaction.rollback()
            transaction.set_autocommit(True)
        return "done"

    browser.get(f"/sync/{do(action)}/")
    assert is_replica(seen[0])
    assert seen[1] == "default"


@pytest.mark.usefixtures("atomic_requests")
@pytest.mark.parametrize("kind", ["sync", "non-atomic"])
def test_transaction_of_atomic_requests_is_ignored(browser: Browser, do: Any, kind: str) -> None:
    """A site with ATOMIC_REQUESTS uses its replicas; an explicit `atomic()` counts."""
    seen: list[Any] = []

    def action(request: Any) -> str:
        seen.append((connections["default"].in_atomic_block, where(), in_transaction(request)[0]))
        return "done"

    browser.get(f"/{kind}/{do(action)}/")
    ((around, outside, inside),) = seen
    assert around is (kind == "sync")
    assert is_replica(outside)
    assert inside == "default"


@pytest.mark.usefixtures("atomic_requests")
def test_transaction_of_another_thread_under_atomic_requests_counts(
    browser: Browser, do: Any
) -> None:
    seen: list[str] = []

    def work() -> None:
        with transaction.atomic():
            seen.append(where())
        connections.close_all()

    def action(request: Any) -> str:
        thread = threading.Thread(target=propagate_scope(work))
        thread.start()
        thread.join()
        with pinning_scope():
            seen.append(where())
        return "done"

    browser.get(f"/sync/{do(action)}/")
    assert seen[0] == "default"
    assert is_replica(seen[1]), "the one around the view is none of an inner scope's either"


@pytest.mark.usefixtures("atomic_requests")
def test_write_under_atomic_requests_pins(browser: Browser, do: Any) -> None:
    seen = []

    def action(request: Any) -> str:
        Book.objects.create()
        seen.append(where())
        return "done"

    browser.get(f"/sync/{do(action)}/")
    assert seen == ["default"]
    assert "pinning" in browser.cookies


@pytest.mark.usefixtures("atomic_requests")
def test_transaction_of_streaming_content_counts(browser: Browser, do: Any) -> None:
    """The transaction of the view has ended when the content is generated."""
    from django.http import StreamingHttpResponse

    seen = []

    def body() -> Any:
        seen.append(where())
        with transaction.atomic():
            seen.append(where())
        yield b"done"

    response = browser.get(f"/sync/{do(lambda request: StreamingHttpResponse(body()))}/")
    if not browser.is_async:
        assert response.getvalue() == b"done"
    else:
        with pytest.warns(Warning, match="must consume synchronous iterators"):
            _consume(response)
    assert is_replica(seen[0])
    assert seen[1] == "default"


def _consume(response: Any) -> None:
    from asgiref.sync import async_to_sync

    async def consume() -> None:
        async for _ in response:
            pass

    async_to_sync(consume)()


@pytest.mark.django_db(databases="__all__")
class TestInsideTestCase:
    """In a `TestCase` each test runs in a transaction that the code did not open."""

    pytestmark = pytest.mark.django_db(databases="__all__")

    def test_transaction_of_the_test_case_is_ignored(self, browser: Browser, do: Any) -> None:
        seen = []

        def action(request: Any) -> str:
            seen.append((connections["default"].in_atomic_block, where()))
            seen.append((True, *in_transaction(request)[:1]))
            return "done"

        browser.get(f"/sync/{do(action)}/")
        (around, outside), (_, inside) = seen
        assert around
        assert is_replica(outside)
        assert inside == "default"


@pytest.mark.parametrize("by_hand", [False, True])
def test_locking_read_keeps_the_scope_on_the_primary_without_a_pin(
    visit: Visit, by_hand: bool
) -> None:
    """SQLite has no locking reads, so one is recorded in the scope directly."""

    def action(request: Any) -> tuple[str, bool]:
        current_scope().record_lock(PoolKey("default"))
        if by_hand:
            unpin_this_request()
        return where(), is_pinned()

    served, _ = visit(action)
    assert is_replica(served) is by_hand
    assert not visit.browser.cookies
    assert is_replica(visit())


# Rule 4: written, pinned manually, or by method


def test_rule_4_write_pins_the_rest_of_the_scope(visit: Visit) -> None:
    def action(request: Any) -> tuple[str, bool, str, bool]:
        before, pinned_before = where(), is_pinned()
        Book.objects.create()
        return before, pinned_before, where(), is_pinned()

    before, pinned_before, after, pinned_after = visit(action)
    assert is_replica(before)
    assert (pinned_before, after, pinned_after) == (False, "default", True)


def test_rule_4_manual_pin(visit: Visit) -> None:
    def action(request: Any) -> tuple[str, bool]:
        pin_this_request()
        return where(), is_pinned()

    assert visit(action) == ("default", True)
    assert visit() == "default"


@pytest.mark.parametrize("method", ["get", "head", "options", "post", "put", "patch", "delete"])
def test_rule_4_methods(visit: Visit, method: str) -> None:
    """A POST reads from the primary; without a write it sets no pin."""
    writes = method in ("post", "put", "patch", "delete")

    def action(request: Any) -> tuple[bool, bool]:
        return where() == "default", is_pinned()

    assert visit(action, method) == (writes, writes)
    assert not visit.browser.cookies
    assert is_replica(visit())


@override_settings(PINNING_PRIMARY_METHODS=("GET",))
def test_rule_4_methods_follow_the_setting(visit: Visit) -> None:
    assert visit() == "default"
    assert is_replica(visit(None, "post"))


@pytest.mark.usefixtures("named")
def test_rule_4_wins_over_the_instance_hint(visit: Visit, named: Callable[..., None]) -> None:
    """An instance read before the write is stale after it."""
    named()

    def action(request: Any) -> str:
        book = Book.objects.get()
        Author.objects.filter(pk=99).update(name="x")
        return book.author.name

    assert visit(action) == "default"


# Rule 6: inherited pins (rule 5 is tested in test_routers.py)


def test_rule_6_pin_of_an_earlier_request(visit: Visit, clock: FrozenDateTimeFactory) -> None:
    """Without a position, the pin lasts until the window ends."""
    visit(lambda request: Book.objects.create())
    clock.tick(14)
    assert visit(lambda request: (where(), is_pinned())) == ("default", True)
    assert visit() == "default", "a read does not use the pin up"
    clock.tick(2)
    assert is_replica(visit())
    assert not visit(lambda request: is_pinned())


def test_inherited_pin_expires_during_a_long_request(
    visit: Visit, clock: FrozenDateTimeFactory
) -> None:
    visit(lambda request: Book.objects.create())

    def action(request: Any) -> tuple[str, str]:
        before = where()
        clock.tick(16)
        return before, where()

    before, after = visit(action)
    assert before == "default"
    assert is_replica(after)


# Rule 7: round robin


def test_rule_7_each_request_uses_the_next_replica(visit: Visit) -> None:
    seen = [visit(lambda request: {where() for _ in range(5)}) for _ in range(4)]
    assert all(len(aliases) == 1 for aliases in seen)
    turns = [aliases.pop() for aliases in seen]
    assert set(turns[:2]) == {"replica1", "replica2"}
    assert turns[:2] == turns[2:]


@override_settings(PINNING_BALANCE_BY="query")
def test_rule_7_each_read_uses_the_next_replica(visit: Visit, named: Callable[..., None]) -> None:
    named()
    turns = visit(lambda request: [str(Book.objects.get()) for _ in range(6)])
    assert Counter(turns) == {"replica1": 3, "replica2": 3}
    assert turns[:2] == turns[2:4] == turns[4:]


@override_settings(PINNING_BALANCE_BY="query")
def test_rule_7_reads_routed_twice_are_spread_evenly(
    visit: Visit, named: Callable[..., None]
) -> None:
    named()

    def read(request: Any) -> list[str]:
        found = []
        for _ in range(4):
            found += [str(book) for book in Book.objects.iterator()]
            found += [str(book) for book in Book.objects.in_bulk([1]).values()]
        return found

    assert Counter(visit(read)) == {"replica1": 4, "replica2": 4}


def test_rule_7_weights() -> None:
    with override_settings(PINNING_REPLICAS={"default": {"replica1": 3, "replica2": 1}}):
        turns = []
        for _ in range(8):
            with pinning_scope():
                turns.append(where())
    assert Counter(turns) == {"replica1": 6, "replica2": 2}


def test_rule_7_first_replica_is_randomised() -> None:
    seen = set()
    for _ in range(64):
        with override_settings(PINNING_REPLICAS=["replica1", "replica2"]), pinning_scope():
            seen.add(where())
    assert seen == {"replica1", "replica2"}


# Test mirrors


@pytest.mark.usefixtures("mirrored")
def test_read_of_a_mirror_returns_the_alias_of_the_primary(visit: Visit) -> None:
    """A `TestCase` then sees its own uncommitted rows."""
    assert visit() == "default"
    assert visit(all_verbs) == "default"


@pytest.mark.usefixtures("mirrored")
def test_explicit_read_of_the_primary_is_not_counted_for_its_mirror() -> None:
    with pinning_scope(), capture_reads() as reads:
        Book.objects.count()
        Book.objects.using("default").count()
        Book.objects.count()
    assert [(read.role, read.reason) for read in reads] == [
        ("replica", "round_robin"),
        ("primary", "explicit"),
        ("replica", "round_robin"),
    ]


@pytest.mark.usefixtures("mirrored")
def test_cursor_of_a_mirror_reads_the_primary_outside_the_block_that_opened_it() -> None:
    with pinning_scope(), capture_reads() as reads:
        with no_failover():
            cursor = connections["replica1"].cursor()
            cursor.execute("SELECT 1")
        Book.objects.create(title="x")
        cursor.execute("SELECT 1")
        cursor.close()
    assert [(read.served, read.reason) for read in reads] == [
        ("replica1", "explicit"),
        ("default", "wrote"),
    ]


@pytest.mark.usefixtures("mirrored")
def test_alias_that_was_renamed_after_its_pool_was_made_is_not_a_mirror(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with override_settings(PINNING_SECONDS=15):
        pool = pools().by_primary["default"]
        assert pool.is_mirror("replica1")
        monkeypatch.setitem(connections.settings["replica1"], "NAME", "another")
        assert not pool.is_mirror("replica1")


@pytest.mark.parametrize("part", ["HOST", "PORT", "ENGINE"])
@pytest.mark.usefixtures("mirrored")
def test_alias_of_another_server_is_not_a_mirror(
    visit: Visit, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    for alias in ("replica1", "replica2"):
        monkeypatch.setitem(connections.settings[alias], part, "elsewhere")
    assert is_replica(visit())


@pytest.mark.parametrize(
    "option", ["target_session_attrs", "load_balance_hosts", "host", "hostaddr", "port", "service"]
)
@pytest.mark.usefixtures("mirrored")
def test_alias_with_other_target_session_attrs_is_not_a_mirror(
    monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """`read-write` and `prefer-standby` resolve to different servers."""
    monkeypatch.setitem(connections.settings["default"], "OPTIONS", {option: "one"})
    monkeypatch.setitem(connections.settings["replica1"], "OPTIONS", {option: "other"})
    monkeypatch.setitem(connections.settings["replica2"], "OPTIONS", {option: "one"})
    is_mirror = pools().by_primary["default"].is_mirror
    assert (is_mirror("replica1"), is_mirror("replica2")) == (False, True)


@pytest.mark.usefixtures("mirrored")
def test_alias_with_another_user_of_one_server_is_a_mirror(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for alias in ("replica1", "replica2"):
        monkeypatch.setitem(connections.settings[alias], "USER", "reader")
    assert visit() == "default"


# Threads, pools and changed settings


def test_transaction_affects_only_its_own_thread() -> None:
    """Reads of other threads use replicas."""
    seen = []

    def ask() -> None:
        seen.append(where())
        connections.close_all()

    with transaction.atomic():
        assert where() == "default"
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert is_replica(seen[0])


def test_pools_are_rebuilt_when_settings_change() -> None:
    before = pools()
    with override_settings(PINNING_REPLICAS={"users": ["users_replica"]}):
        assert list(pools().by_primary) == ["users"]
    assert list(pools().by_primary) == ["default"]
    assert pools() is not before


@pytest.mark.parametrize("call", [is_pinned, pin_this_request, unpin_this_request])
@pytest.mark.parametrize("alias", ["replica1", "users", "typo"])
def test_alias_that_is_not_a_primary_raises(call: Callable[..., Any], alias: str) -> None:
    with pytest.raises(ValueError, match=rf"'{alias}' is not a primary .*\('default'\)"):
        call(alias)
