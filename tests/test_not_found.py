"""Views and functions that find nothing on a replica, and are run again on the primary."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import PermissionDenied
from django.db import OperationalError, connections, models, transaction
from django.db.backends.sqlite3.base import DatabaseWrapper
from django.http import Http404, HttpResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404
from django.template.backends.django import DjangoTemplates
from django.template.response import TemplateResponse
from django.test import Client, override_settings
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from freezegun.api import FrozenDateTimeFactory
from rest_framework.response import Response
from rest_framework.views import APIView

from pinning_middleware import (
    ignore_writes,
    pinning_scope,
    propagate_scope,
    retry_404,
    use_replica,
)
from pinning_middleware.not_found import RetryLimit
from pinning_middleware.reasons import Reason
from pinning_middleware.scopes.scope import current_scope
from pinning_middleware.stats import get_stats
from pinning_middleware.utils import counters
from tests.app.models import Book
from tests.conftest import Browser

from .app.urls import urlpatterns as app_patterns

pytestmark = [
    pytest.mark.django_db(transaction=True, databases="__all__"),
    pytest.mark.urls(__name__),
]

Do = Callable[[Callable[..., Any]], str]
# How often a view was run.
runs: list[str] = []


@pytest.fixture(autouse=True)
def fresh_limit() -> Iterator[None]:
    runs.clear()
    counters.retries_404.clear()
    with override_settings(PINNING_RETRY_404=True):
        yield


def find(request: Any) -> str:
    runs.append(request.method)
    return str(get_object_or_404(Book, title="new").title)


def write() -> None:
    """Write as another client; the replicas of these tests never have it."""
    with pinning_scope(isolated=True):
        Book.objects.create(title="new")


class FindView(View):
    def get(self, request: Any) -> HttpResponse:
        return HttpResponse(find(request))


class AsyncView(View):
    async def get(self, request: Any) -> HttpResponse:
        runs.append("GET")
        found = await Book.objects.filter(title="new").afirst()
        return HttpResponse("" if found is None else found.title, status=200 if found else 404)


class ApiView(APIView):
    authentication_classes = ()

    def get(self, request: Any) -> Response:
        return Response(find(request))


def ask_graphql(request: Any) -> HttpResponse:
    runs.append(request.method)
    return HttpResponse(Book.objects.filter(title="new").values_list("title").first() or "null")


urlpatterns = [
    *app_patterns,
    path("class/", FindView.as_view()),
    path("async-class/", AsyncView.as_view()),
    path(
        "async-dispatch/",
        method_decorator(retry_404, name="dispatch")(
            type("Dispatched", (AsyncView,), {})
        ).as_view(),
    ),
    path("api/", ApiView.as_view()),
    path("excluded/", retry_404(False)(FindView.as_view())),
    path("marked/", retry_404(FindView.as_view())),
    path(
        "excluded-get/",
        method_decorator(retry_404(False), name="get")(
            type("Excluded", (FindView,), {"get": FindView.get})
        ).as_view(),
    ),
    path("graphql/", retry_404(is_miss=lambda response: response.content == b"null")(ask_graphql)),
]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_reader_finds_on_the_primary_what_another_browser_wrote(
    new_browser: Callable[..., Browser], do: Do, kind: str
) -> None:
    def create(request: Any) -> str:
        return str(Book.objects.create(title="new").pk)

    writer, reader = new_browser(), new_browser()
    writer.post(f"/sync/{do(create)}/")
    address = f"/{kind}/{do(find)}/"
    with override_settings(PINNING_RETRY_404=False):
        assert reader.get(address).status_code == 404
    runs.clear()
    response = reader.get(address)
    assert (response.status_code, response.content) == (200, b"new")
    assert runs == ["GET", "GET"]
    assert counters.reads["default", "default", None, Reason.RETRY_404] == 1
    assert get_stats()["retry_404"] == {"found": 1, "missing": 0, "refused": 0}
    assert "pinning" not in response.cookies


@pytest.mark.parametrize("address", ["class", "async-class", "async-dispatch", "api", "graphql"])
@pytest.mark.parametrize("method", ["get", "head"])
def test_view_of_each_kind_is_run_again(browser: Browser, address: str, method: str) -> None:
    write()
    response = getattr(browser, method)(f"/{address}/")
    assert (response.status_code, len(runs)) == (200, 2)
    if method == "get":
        assert b"new" in response.content


def test_404_of_both_servers_remains_a_404(browser: Browser, do: Do) -> None:
    assert browser.get(f"/sync/{do(find)}/").status_code == 404
    assert len(runs) == 2
    assert counters.retries_404 == {"missing": 1}


def test_exception_of_the_second_run_is_raised(browser: Browser, do: Do) -> None:
    def act(request: Any) -> None:
        find(request)
        raise PermissionDenied

    write()
    assert browser.get(f"/sync/{do(act)}/").status_code == 403
    assert counters.retries_404 == {"found": 1}


def test_atomic_requests_view_is_run_again_in_a_transaction_of_its_own(
    browser: Browser, do: Do, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)
    commits: list[int] = []

    def act(request: Any) -> str:
        number = len(runs) + 1
        transaction.on_commit(lambda: commits.append(number))
        return find(request)

    write()
    assert browser.get(f"/sync/{do(act)}/").content == b"new"
    assert commits == [2]
    assert {reason for _, _, _, reason in counters.reads} == {Reason.ROUND_ROBIN, Reason.RETRY_404}


def test_template_response_of_the_second_run_is_rendered_on_the_primary(
    browser: Browser, do: Do
) -> None:
    options = {"NAME": "own", "DIRS": [], "APP_DIRS": False, "OPTIONS": {}}
    template: Any = DjangoTemplates(options).from_string("{{ books.count }}")

    def act(request: Any) -> Any:
        status = 200 if Book.objects.filter(title="new").exists() else 404
        books = {"books": Book.objects.all()}
        return TemplateResponse(request, template, books, status=status)

    write()
    response = browser.get(f"/sync/{do(act)}/")
    assert (response.status_code, response.content) == (200, b"1")


# What is not run again


@pytest.mark.parametrize("address", ["excluded", "excluded-get"])
def test_excluded_view_is_not_run_again(browser: Browser, address: str) -> None:
    write()
    assert browser.get(f"/{address}/").status_code == 404
    assert runs == ["GET"]


@pytest.mark.parametrize("address", ["marked", "async-dispatch"])
def test_marked_view_is_run_again_without_the_setting(browser: Browser, address: str) -> None:
    write()
    with override_settings(PINNING_RETRY_404=False):
        assert browser.get("/class/").status_code == 404
        assert browser.get(f"/{address}/").status_code == 200
    assert len(runs) == 3


def test_marked_view_is_run_again_once_only(browser: Browser) -> None:
    assert browser.get("/marked/").status_code == 404
    assert len(runs) == 2


def test_request_with_another_method_is_not_run_again(browser: Browser, do: Do) -> None:
    write()
    with override_settings(PINNING_PRIMARY_METHODS=()):
        for view in (find, retry_404(find)):
            assert browser.post(f"/sync/{do(view)}/").status_code == 404
    assert runs == ["POST", "POST"]


def test_streaming_response_is_not_run_again(browser: Browser, do: Do) -> None:
    def act(request: Any) -> Any:
        runs.append("GET")
        return StreamingHttpResponse([str(Book.objects.count())], status=404)

    assert browser.get(f"/sync/{do(act)}/").status_code == 404
    assert runs == ["GET"]


def write_ignored(request: Any) -> None:
    with ignore_writes():
        Book.objects.create(title="seen")


def write_elsewhere(request: Any) -> None:
    Book.objects.using("elsewhere").create(title="seen")


def write_isolated(request: Any) -> None:
    with pinning_scope(isolated=True):
        Book.objects.create(title="seen")


@pytest.mark.parametrize("change", [write_ignored, write_elsewhere, write_isolated])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_request_that_wrote_to_any_database_is_not_run_again(
    browser: Browser, do: Do, change: Callable[[Any], None], kind: str
) -> None:
    def act(request: Any) -> None:
        runs.append("GET")
        Book.objects.count()
        change(request)
        raise Http404

    assert browser.get(f"/{kind}/{do(act)}/").status_code == 404
    assert runs == ["GET"]


def test_view_that_read_no_replica_is_not_run_again(browser: Browser, do: Do) -> None:
    def act(request: Any) -> None:
        runs.append("GET")
        Book.objects.using("default").count()
        raise Http404

    assert browser.get(f"/sync/{do(act)}/").status_code == 404
    assert runs == ["GET"]


def test_view_that_accepts_stale_data_is_not_run_again(browser: Browser, do: Do) -> None:
    write()
    assert browser.get(f"/sync/{do(use_replica(find))}/").status_code == 404
    assert runs == ["GET"]


def test_replica_answers_if_the_primary_fails(
    browser: Browser, do: Do, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DatabaseWrapper.create_cursor

    def create_cursor(self: Any, name: str | None = None) -> Any:
        if self.alias == "default" and runs:
            raise OperationalError("the primary is down")
        return original(self, name)

    monkeypatch.setattr(DatabaseWrapper, "create_cursor", create_cursor)
    assert browser.get(f"/sync/{do(find)}/").status_code == 404
    assert len(runs) == 2


# The limit


def test_scanner_of_random_urls_stays_within_the_limit(
    browser: Browser, do: Do, clock: FrozenDateTimeFactory
) -> None:
    address = f"/sync/{do(find)}/"
    with override_settings(PINNING_RETRY_404=0.1):
        for _ in range(100):
            browser.get(address)
    # The one of this second, and a tenth of the requests.
    assert counters.retries_404 == {"missing": 11, "refused": 89}
    assert len(runs) == 111
    clock.tick(1)
    with override_settings(PINNING_RETRY_404=0.001):
        browser.get(address)
    assert counters.retries_404["missing"] == 12


def test_limit_does_not_save_up_more_than_its_capacity(clock: FrozenDateTimeFactory) -> None:
    own = RetryLimit()
    for _ in range(1000):
        own.earn(1)
    assert [own.spend() for _ in range(12)] == [True] * 11 + [False]


def test_share_of_one_retries_every_request(browser: Browser, do: Do) -> None:
    address = f"/sync/{do(find)}/"
    with override_settings(PINNING_RETRY_404=1):
        for _ in range(20):
            browser.get(address)
    assert counters.retries_404 == {"missing": 20}


# Functions that are no views


def get_book() -> str:
    runs.append("task")
    return Book.objects.get(title="new").title


async def aget_book() -> str:
    runs.append("task")
    return (await Book.objects.aget(title="new")).title


def test_function_is_run_again_on_does_not_exist() -> None:
    write()
    with pinning_scope(isolated=True):
        assert retry_404(get_book)() == "new"
    with pytest.raises(Book.DoesNotExist):
        get_book()
    assert runs == ["task"] * 3


def test_coroutine_function_is_run_again_on_does_not_exist() -> None:
    write()
    with pinning_scope(isolated=True):
        assert async_to_sync(retry_404()(aget_book))() == "new"
    assert runs == ["task"] * 2


def test_function_that_wrote_is_not_run_again() -> None:
    def act() -> None:
        Book.objects.count()
        write_elsewhere(None)
        get_book()

    write()
    with pinning_scope(isolated=True), pytest.raises(Book.DoesNotExist):
        retry_404(act)()
    assert runs == ["task"]


def test_read_of_a_thread_with_the_scope_counts() -> None:
    def act() -> str:
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(propagate_scope(get_book)).result()

    write()
    with pinning_scope(isolated=True):
        assert retry_404(act)() == "new"
    assert runs == ["task"] * 2


def test_runs_at_the_same_time_are_repeated_each() -> None:
    """As the resolvers of GraphQL."""

    async def both() -> list[str]:
        return await asyncio.gather(*[retry_404(aget_book)() for _ in range(2)])

    write()
    with pinning_scope(isolated=True):
        assert async_to_sync(both)() == ["new", "new"]
    assert runs == ["task"] * 4


def test_class_is_refused() -> None:
    with pytest.raises(TypeError, match="method_decorator"):
        retry_404(FindView)


def test_routes_of_a_run_are_kept_for_server_timing() -> None:
    write()
    with pinning_scope(isolated=True):
        Book.objects.count()
        retry_404(get_book)()
        reasons_of_scope = [reason for _, reason in current_scope().routes]
    assert reasons_of_scope == [Reason.ROUND_ROBIN, Reason.RETRY_404]


def test_model_without_rows_is_no_miss(browser: Browser, do: Do) -> None:
    def act(request: Any) -> str:
        runs.append("GET")
        return str(Book.objects.aggregate(number=models.Count("pk"))["number"])

    assert browser.get(f"/sync/{do(act)}/").content == b"0"
    assert runs == ["GET"]


def test_without_the_setting_the_view_is_not_wrapped(client: Client, do: Do) -> None:
    def act(request: Any) -> str:
        assert current_scope().wrap_view is None
        return "done"

    with override_settings(PINNING_RETRY_404=False):
        assert client.get(f"/sync/{do(act)}/").content == b"done"
