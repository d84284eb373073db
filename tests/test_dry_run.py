"""PINNING_DRY_RUN: no replica, and every read is decided as if there were one."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.core.cache import caches
from django.core.cache.backends.locmem import LocMemCache
from django.core.checks import run_checks
from django.core.management import call_command
from django.db import connection, router, transaction
from django.test import Client, override_settings
from freezegun.api import FrozenDateTimeFactory
from health_check.exceptions import ServiceWarning

from pinning_middleware import (
    dry_run_report,
    is_pinned,
    no_failover,
    offload,
    pin_this_request,
    pinning_scope,
    unpin_this_request,
    use_primary,
    use_replica,
)
from pinning_middleware.conf import DEFAULTS, conf
from pinning_middleware.contrib.health_check import Replicas
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.overrides import OverrideKind, pop, push
from pinning_middleware.stores import dry_run_counts
from pinning_middleware.utils import counters
from tests.app.models import Account, Book, Tag

from .conftest import Browser, Visit, saved

pytestmark = pytest.mark.django_db(databases=["default", "users"], transaction=True)

LAG = 2
STATUS_PAGE = {
    "ROOT_URLCONF": "tests.monitoring.urls",
    "STATIC_URL": "/static/",
    "SESSION_ENGINE": "django.contrib.sessions.backends.signed_cookies",
    "TEMPLATES": [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
}


@pytest.fixture(autouse=True)
def dry_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dry_run_counts, "has_thread", True)
    monkeypatch.setattr(dry_run_counts, "_progress", dry_run_counts.Progress())
    counters.missed_writes.clear()
    with override_settings(PINNING_REPLICAS=[], PINNING_DRY_RUN={"default": LAG}):
        yield
    counters.missed_writes.clear()


def report() -> dry_run_report.DryRun:
    (found,) = dry_run_report.of_this_process()
    return found


@pytest.fixture
def counted() -> Callable[[], dict[str, int]]:
    """Return a function that returns the reads by reason since it was last called."""
    before: Counter[str] = Counter()

    def count() -> dict[str, int]:
        now = Counter(report().reasons)
        new = now - before
        before.update(new)
        return dict(new)

    count()
    return count


def read(request: Any = None) -> str | None:
    return saved(Tag.objects.get())


def write(request: Any = None) -> None:
    Tag.objects.create(name="x")


@pytest.fixture
def tag(counted: Callable[[], dict[str, int]]) -> None:
    """A row that was written long ago."""
    with pinning_scope(isolated=True):
        write()
    counted()
    counters.missed_writes.clear()


# Decisions


def test_unpinned_read_is_counted_as_one_for_a_replica(
    tag: None, visit: Visit, counted: Callable[[], dict[str, int]]
) -> None:
    assert visit(read) == "default"
    assert counted() == {"round_robin": 1}
    assert "pinning" not in visit.browser.cookies


def test_read_after_a_write_is_pinned_and_would_have_missed_it(
    tag: None, visit: Visit, counted: Callable[[], dict[str, int]]
) -> None:
    visit(lambda request: Tag.objects.update(name="y"))
    assert visit.browser.cookies["pinning"].value
    counted()
    visit(read)
    assert counted() == {"pinned": 1}
    assert report().missed_writes == 1


def test_pinned_read_after_the_assumed_lag_would_have_missed_nothing(
    clock: FrozenDateTimeFactory,
    tag: None,
    visit: Visit,
    counted: Callable[[], dict[str, int]],
) -> None:
    visit(lambda request: Tag.objects.update(name="y"))
    counted()
    clock.tick(LAG + 0.1)
    visit(read)
    # Without positions the window serves.
    assert counted() == {"pinned": 1}
    assert report().missed_writes == 0
    clock.tick(DEFAULTS["PINNING_SECONDS"])
    visit(read)
    assert counted() == {"round_robin": 1}


def test_read_of_the_request_that_wrote_would_have_missed_it(
    tag: None, visit: Visit, counted: Callable[[], dict[str, int]]
) -> None:
    def act(request: Any) -> None:
        Tag.objects.update(name="y")
        read()

    visit(act)
    assert counted() == {"wrote": 1}
    assert report().missed_writes == 1


def test_pin_without_a_write_keeps_no_read_from_a_replica_that_lacks_one(
    tag: None, visit: Visit, counted: Callable[[], dict[str, int]]
) -> None:
    for seconds in (None, 600):
        visit(lambda request, seconds=seconds: pin_this_request(seconds=seconds))
        visit(read)
    assert counted() == {"pinned": 2}
    assert report().missed_writes == 0


def test_longer_pin_does_not_make_a_write_more_recent(
    clock: FrozenDateTimeFactory, tag: None, visit: Visit, counted: Callable[[], dict[str, int]]
) -> None:
    def act(request: Any) -> None:
        write()
        pin_this_request(seconds=600)

    visit(act)
    counted()
    visit(lambda request: Tag.objects.count())
    assert report().missed_writes == 1
    for _ in range(3):
        clock.tick(50)
        visit(lambda request: Tag.objects.count())
    assert counted() == {"pinned": 4}
    assert report().missed_writes == 1


def test_write_that_was_forgotten_is_not_missed(
    tag: None, visit: Visit, counted: Callable[[], dict[str, int]]
) -> None:
    visit(write)
    visit(lambda request: unpin_this_request())
    visit(lambda request: pin_this_request())
    counted()
    visit(lambda request: Tag.objects.count())
    assert counted() == {"pinned": 1}
    assert report().missed_writes == 0


def test_scope_inside_a_request_would_miss_what_the_client_wrote(
    tag: None, visit: Visit, counted: Callable[[], dict[str, int]]
) -> None:
    def act(request: Any) -> None:
        with pinning_scope():
            read()

    visit(lambda request: Tag.objects.update(name="y"))
    counted()
    visit(act)
    assert counted() == {"pinned": 1}
    assert report().missed_writes == 1


def test_read_that_is_part_of_saving_would_have_missed_nothing(
    tag: None, visit: Visit, counted: Callable[[], dict[str, int]]
) -> None:
    def act(request: Any) -> None:
        Tag.objects.update(name="y")
        push(OverrideKind.SAVING, act)
        Tag.objects.count()
        pop(act)

    visit(act)
    assert counted() == {"wrote": 1}
    assert report().missed_writes == 0


def test_no_failover_does_not_change_the_reason(
    tag: None, counted: Callable[[], dict[str, int]]
) -> None:
    with pinning_scope(), no_failover():
        read()
        Tag.objects.using("default").get()
    assert counted() == {"round_robin": 1, "explicit": 1}


def test_read_of_another_client_is_not_pinned(
    tag: None, new_browser: Callable[..., Browser], do: Callable[..., str]
) -> None:
    counters.reads.clear()
    new_browser().get(f"/sync/{do(lambda request: Tag.objects.update(name='y'))}/")
    new_browser().get(f"/sync/{do(read)}/")
    assert report().reasons == {"round_robin": 1}
    assert report().missed_writes == 0


@pytest.mark.parametrize(
    ("reason", "chosen"),
    [
        ("http_method", {}),
        ("primary_model", {"PINNING_PRIMARY_MODELS": ["app.Tag"]}),
        ("not_offloaded", {"PINNING_OFFLOAD": False}),
    ],
)
def test_read_that_stays_on_the_primary_anyway_would_have_missed_nothing(
    reason: str,
    chosen: dict[str, Any],
    tag: None,
    visit: Visit,
    counted: Callable[[], dict[str, int]],
) -> None:
    method = "post" if reason == "http_method" else "get"
    with override_settings(**chosen):
        visit(read, method)
        assert counted() == {reason: 1}

        def act(request: Any) -> None:
            Tag.objects.update(name="y")
            read()

        visit(act, method)
        assert counted() == {"wrote": 1}
        visit(read, method)
    assert report().missed_writes == 0


def test_offload_function_is_called_once_in_a_request(
    tag: None, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("tests.test_dry_run.offloads", lambda request: not calls.append(request))

    def act(request: Any) -> None:
        Tag.objects.update(name="y")
        read()
        read()

    with override_settings(PINNING_OFFLOAD="tests.test_dry_run.offloads"):
        visit(act)
        assert len(calls) == 1
    assert report().missed_writes == 2


def offloads(request: Any) -> bool:
    raise NotImplementedError


def test_rules_apply_in_their_order(tag: None, counted: Callable[[], dict[str, int]]) -> None:
    with pinning_scope():
        read()
        with transaction.atomic():
            read()
        with use_primary():
            read()
        with use_replica():
            read()
        with use_replica(max_lag=LAG - 1):
            read()
        with use_replica(max_lag=LAG):
            read()
        Tag.objects.using("default").get()
        with connection.cursor() as cursor:
            cursor.execute("SELECT name FROM app_tag")
    assert counted() == {
        "round_robin": 1,
        "transaction": 1,
        "use_primary": 1,
        "use_replica": 2,
        "no_replica": 1,
        "explicit": 2,
    }


def test_writes_of_raw_cursors_pin(
    tag: None, visit: Visit, counted: Callable[[], dict[str, int]]
) -> None:
    def act(request: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("UPDATE app_tag SET name = 'y'")

    visit(act)
    visit(read)
    assert counted() == {"pinned": 1}


def test_related_objects_and_iterators_are_counted_once(
    tag: None, counted: Callable[[], dict[str, int]]
) -> None:
    with pinning_scope():
        assert [saved(each) for each in Tag.objects.iterator()] == ["default"]
        assert Tag.objects.in_bulk() != {}
    assert counted() == {"round_robin": 2}


async def aread() -> None:
    await Tag.objects.aget()


def test_reads_of_async_code(tag: None, counted: Callable[[], dict[str, int]]) -> None:
    async def main() -> None:
        with pinning_scope():
            await aread()
            await asyncio.gather(aread(), aread())
            await sync_to_async(write)()
            assert is_pinned("default")
            await Tag.objects.acount()

    asyncio.run(main())
    assert counted() == {"round_robin": 3, "wrote": 1}
    assert report().missed_writes == 1


def test_post_that_is_offloaded(tag: None, visit: Visit) -> None:
    def act(request: Any) -> None:
        with offload():
            read()

    counters.reads.clear()
    visit(act, "post")
    assert report().reasons == {"round_robin": 1}


def test_aliases_without_a_dry_run_are_not_counted() -> None:
    Account.objects.using("users").count()
    assert report().reads == 0
    assert "users" not in pools().by_alias


def test_disabled_package_decides_nothing(tag: None, visit: Visit) -> None:
    with override_settings(PINNING_ENABLED=False):
        counters.reads.clear()
        visit(read)
        assert report().reasons == {"disabled": 1}
        assert "PINNING_ENABLED is False" in " ".join(report().summary)


@pytest.mark.parametrize(
    "chosen",
    [
        {"PINNING_PRIMARY_DOWN": "stale"},
        {"PINNING_MAX_LAG": 1},
        {"PINNING_CONSISTENCY": "monotonic-reads"},
        {"PINNING_BALANCE_BY": "query"},
        {"PINNING_BALANCE_BY": "user"},
        {"PINNING_RETRY_404": True},
        {"PINNING_WAIT": 1},
    ],
    ids=str,
)
def test_other_settings_do_not_matter(chosen: dict[str, Any], tag: None, visit: Visit) -> None:
    with override_settings(**chosen):
        counters.reads.clear()
        visit(read)
        visit(read)
        assert report().reasons == {"round_robin": 2}
        assert "pinning" not in visit.browser.cookies


def test_replicas_come_before_the_dry_run_of_their_primary() -> None:
    with override_settings(PINNING_REPLICAS=["replica1"]):
        assert [spec.assumed_lag for spec in conf.pools] == [None]
        assert router.db_for_read(Book) == "replica1"
        assert dry_run_report.of_this_process() == []


# The report


def test_report_adds_up(tag: None, visit: Visit) -> None:
    counters.reads.clear()
    for _ in range(6):
        visit(read)
    visit(read, "post")
    visit(lambda request: Tag.objects.update(name="y"))
    visit(read)
    found = report()
    assert (found.reads, found.to_replicas, found.waiting, found.on_primary) == (8, 6, 1, 1)
    text = " ".join(found.summary)
    assert "a replica that lags 2.0 s" in text
    assert "Of 8 reads, 75.0 % could go to replicas, 12.5 % would stay" in text
    assert "1 of them (12.5 %) would have missed" in text
    assert "would serve 25.0 % of the reads that it serves now, and all writes" in text


def status(*arguments: str) -> str:
    output = StringIO()
    call_command("pinning_status", *arguments, stdout=output)
    return output.getvalue()


def test_status_command_shows_the_dry_run(tag: None, visit: Visit) -> None:
    counters.reads.clear()
    assert "No read has been counted." in status()
    visit(read)
    text = status()
    assert "Of 1 read, 100.0 % could go to replicas" in text
    assert "round_robin: the next replica, round robin" in text
    # The cache of the tests is local memory.
    assert "see the status page" in text
    found = json.loads(status("--json"))
    assert found["status"] == 0
    assert found["dry_run"]["default"]["reasons"] == {"round_robin": 1}
    assert found["dry_run"]["default"]["to_replicas"] == 1
    assert found["dry_run"]["default"]["assumed_lag"] == LAG
    assert "100.0 %" in found["dry_run"]["default"]["summary"]


def test_status_command_without_a_dry_run_has_no_section() -> None:
    with override_settings(PINNING_DRY_RUN=None):
        assert "ry run" not in status()
        assert "dry_run" not in json.loads(status("--json"))


def test_status_page_shows_the_dry_run(tag: None) -> None:
    text = re.compile(r"Of \d+ reads?, [\d.]+ % could go to replicas")
    with pinning_scope(isolated=True):
        ada = User.objects.create_user("ada", is_staff=True)
    with override_settings(**STATUS_PAGE):
        staff = Client()
        staff.force_login(ada)
        assert text.search(staff.get("/pinning/").content.decode())
        assert text.search(staff.get("/pinning/data/").json()["dry_run"])
        with override_settings(PINNING_DRY_RUN=None):
            assert staff.get("/pinning/data/").json()["dry_run"] == ""
            page = staff.get("/pinning/").content.decode()
            assert '<section aria-labelledby="dry-run" hidden>' in page


def test_health_check_warns_that_there_is_no_replica() -> None:
    with pytest.raises(ServiceWarning, match="Every read of 'default' goes to the primary"):
        Replicas().run()


@pytest.fixture(params=["filebased.FileBasedCache", "db.DatabaseCache"])
def shared_cache(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[None]:
    """A cache that the processes of a site share."""
    location = "dry_run_cache" if request.param.startswith("db") else str(tmp_path)
    entry = {"BACKEND": f"django.core.cache.backends.{request.param}", "LOCATION": location}
    with override_settings(CACHES={"default": entry}):
        call_command("createcachetable", verbosity=0)
        counters.reads.clear()
        yield
        with connection.cursor() as cursor:
            cursor.execute("DROP TABLE IF EXISTS dry_run_cache")


def begin_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    counters.reads.clear()
    monkeypatch.setattr(dry_run_counts, "_progress", dry_run_counts.Progress())


def test_counts_of_processes_add_up_in_the_cache(
    tag: None, shared_cache: None, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit(read)
    dry_run_counts.flush()
    visit(read)
    dry_run_counts.flush()
    # Flushed already, or not yet: each read counts once.
    visit(read)
    (found,) = dry_run_report.of_all_processes()
    assert found.reads == 3
    begin_another_process(monkeypatch)
    visit(lambda request: Tag.objects.update(name="y"))
    visit(read)
    assert "Of 3 reads, 66.7 % could go to replicas, 33.3 % would stay" in status()
    assert json.loads(status("--json"))["dry_run"]["default"]["missed_writes"] == 1


def reads_of_all_processes() -> int:
    (found,) = dry_run_report.of_all_processes()
    return found.reads


def test_counts_are_kept_for_a_week(
    clock: FrozenDateTimeFactory,
    tag: None,
    shared_cache: None,
    visit: Visit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visit(read)
    dry_run_counts.flush()
    begin_another_process(monkeypatch)
    for _ in range(2):
        visit(read)
        dry_run_counts.flush()
    assert reads_of_all_processes() == 3
    clock.tick(86_400)
    # The process goes on: what it counted yesterday does not count twice.
    visit(read)
    assert reads_of_all_processes() == 4
    dry_run_counts.flush()
    assert reads_of_all_processes() == 4
    begin_another_process(monkeypatch)
    clock.tick(5 * 86_400)
    assert reads_of_all_processes() == 4
    clock.tick(86_400)
    assert reads_of_all_processes() == 1
    clock.tick(86_400)
    assert reads_of_all_processes() == 0


def test_process_that_is_missing_in_the_index_enters_it_again(
    tag: None, shared_cache: None, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit(read)
    dry_run_counts.flush()
    # Another process has entered it at the same instant.
    with dry_run_counts.cache_context():
        caches["default"].set(dry_run_counts._index_key(dry_run_counts._today()), ["another"])
    visit(read)
    dry_run_counts.flush()
    begin_another_process(monkeypatch)
    assert reads_of_all_processes() == 2


def test_flush_and_report_count_no_read_of_their_own(
    tag: None, shared_cache: None, visit: Visit
) -> None:
    visit(read)
    with pinning_scope(isolated=True) as scope:
        for _ in range(3):
            visit(read)
            before = report().reads
            dry_run_counts.flush()
            assert reads_of_all_processes() == report().reads == before
        assert not scope.pins


class OwnCache(LocMemCache):
    """A cache as that of django-prometheus, which adds metrics."""


def test_subclass_of_a_local_cache_is_not_shared() -> None:
    for name in (f"{__name__}.OwnCache", "django.core.cache.backends.dummy.DummyCache"):
        with override_settings(CACHES={"default": {"BACKEND": name}}):
            assert not dry_run_counts.is_cache_shared()


def test_status_command_if_the_cache_fails(tag: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to the cache")

    monkeypatch.setattr(dry_run_counts, "is_cache_shared", lambda: True)
    monkeypatch.setattr(type(caches["default"]), "get_many", fail)
    assert "which fails: no route to the cache" in status()
    assert "no route" in json.loads(status("--json"))["dry_run_problem"]


def test_first_read_starts_the_thread_that_flushes_counts(
    tag: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(dry_run_counts, "has_thread", False)
    monkeypatch.setattr(dry_run_counts, "start", lambda: started.append(True))
    with override_settings(PINNING_DRY_RUN=None):
        read()
        assert not started
    read()
    assert started


# System checks


def messages() -> list[tuple[str | None, str, str | None]]:
    return [(m.id, m.msg, m.hint) for m in run_checks(tags=["pinning"])]


@pytest.mark.parametrize("value", [None, {}, {"default": 2}, {"default": 0.5, "users": 0}])
def test_valid_values_pass_the_check(value: Any) -> None:
    with override_settings(PINNING_DRY_RUN=value):
        assert messages() == []


@pytest.mark.parametrize(
    "value",
    [
        *(2, "default", ["default"], True, False, [("default", 2)]),
        *({"default": "2"}, {"default": -1}, {"default": True}, {"default": None}),
        *({"default": float("nan")}, {"default": float("inf")}, {"default": [2]}, {5: 2}),
        {"typo": 2},
    ],
    ids=str,
)
def test_invalid_values_are_errors(value: Any) -> None:
    with override_settings(PINNING_DRY_RUN=value):
        found = messages()
        assert [number for number, _, _ in found] == ["pinning_middleware.E027"]
        assert '{"default": 2}' in str(found[0][2])
        # The site still runs.
        if value != {"typo": 2}:
            assert conf.dry_run == {}


def test_unknown_alias_suggests_a_known_one() -> None:
    with override_settings(PINNING_DRY_RUN={"defualt": 2}):
        ((_, text, hint),) = messages()
        assert text == "PINNING_DRY_RUN contains 'defualt', which is not an alias of DATABASES."
        assert hint == "Did you mean default?"


def test_primary_with_replicas_is_an_error() -> None:
    with override_settings(PINNING_REPLICAS=["replica1"]):
        ((number, text, _),) = messages()
        assert number == "pinning_middleware.E027"
        assert "'default', which has replicas in PINNING_REPLICAS" in text
        with override_settings(PINNING_DRY_RUN={"replica1": 2}):
            assert "'replica1', which is a replica" in messages()[0][1]
    with override_settings(SLAVE_DATABASES=["slave"]):
        assert "'default', which has replicas in SLAVE_DATABASES" in messages()[0][1]
        assert conf.pools == ()


def test_lag_above_the_window_is_a_warning() -> None:
    with override_settings(PINNING_SECONDS=1):
        ((number, text, _),) = messages()
        assert number == "pinning_middleware.W032"
        assert "a lag of 2 s for 'default'" in text


def test_missing_middleware_and_router_are_warnings() -> None:
    with override_settings(MIDDLEWARE=[], DATABASE_ROUTERS=[]):
        found = messages()
    assert [number for number, _, _ in found] == [
        "pinning_middleware.W002",
        "pinning_middleware.W003",
    ]
    assert all(text.startswith("PINNING_DRY_RUN is set, but") for _, text, _ in found)


def test_read_goes_on_if_no_thread_can_be_started(
    tag: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(dry_run_counts, "has_thread", False)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        read()
    assert not dry_run_counts.has_thread
