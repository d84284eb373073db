from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.http import HttpRequest, HttpResponse
from django.template import Context, Engine
from django.template.response import TemplateResponse
from django.test import override_settings
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import (
    ignore_writes,
    is_pinned,
    pin_this_request,
    pinning_scope,
    unpin_this_request,
    use_primary,
    use_replica,
)
from pinning_middleware.testing import capture_reads
from tests.app.models import Book
from tests.conftest import Browser, Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


def kind() -> str:
    return "primary" if where() == "default" else "replica"


async def akind() -> str:
    await asyncio.sleep(0)
    return kind()


def threaded(thread_sensitive: bool) -> Any:
    return sync_to_async(kind, thread_sensitive=thread_sensitive)


# Each way to apply a function of the API, to sync and to async functions.
WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "bare decorator": lambda verb, function: verb(function),
    "decorator": lambda verb, function: verb()(function),
    "decorator with an alias": lambda verb, function: verb("default")(function),
    "decorator by keyword": lambda verb, function: verb(using="default")(function),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize(("verb", "answer"), [(use_primary, "primary"), (use_replica, "replica")])
@pytest.mark.parametrize("pinned", [False, True])
def test_decorators(way: Any, verb: Any, answer: str, pinned: bool) -> None:
    """A decorator affects reads of the function and none after it."""
    decorated, adecorated = way(verb, kind), way(verb, akind)
    assert (decorated.__name__, adecorated.__name__) == ("kind", "akind")
    assert iscoroutinefunction(adecorated)
    assert not iscoroutinefunction(decorated)
    outside = "primary" if pinned else "replica"
    with pinning_scope():
        if pinned:
            pin_this_request()
        assert (decorated(), kind()) == (answer, outside)
        assert (async_to_sync(adecorated)(), kind()) == (answer, outside)


@pytest.mark.parametrize(("verb", "answer"), [(use_primary, "primary"), (use_replica, "replica")])
@pytest.mark.parametrize("using", [None, "default"])
def test_context_managers(verb: Any, answer: str, using: str | None) -> None:
    with pinning_scope():
        with verb(using):
            assert kind() == answer
        assert kind() == "replica"


def test_innermost_block_wins_and_exit_restores_the_outer_one() -> None:
    with pinning_scope():
        with use_primary():
            with use_replica():
                with use_primary():
                    with use_primary():
                        assert kind() == "primary"
                    assert kind() == "primary"
                assert kind() == "replica"
            assert kind() == "primary"
        assert kind() == "replica"


def test_context_manager_is_reusable() -> None:
    block = use_primary()
    with pinning_scope():
        with block:
            with use_replica(), block:
                assert kind() == "primary"
            assert kind() == "primary"
        assert kind() == "replica"


@pytest.mark.parametrize("verb", [use_primary, use_replica, ignore_writes])
def test_exception_restores_the_outer_state(verb: Any) -> None:
    @verb
    def fails() -> None:
        raise LookupError

    @verb
    async def afails() -> None:
        raise LookupError

    with pinning_scope():
        for call in (fails, async_to_sync(afails)):
            with pytest.raises(LookupError):
                call()
            with pytest.raises(LookupError), verb():
                raise LookupError
        assert kind() == "replica"
        Book.objects.create()
        assert is_pinned()
        assert kind() == "primary"


def test_block_applies_across_sync_and_async_bridges() -> None:
    """`await`, `sync_to_async` in either thread, `async_to_sync`, child tasks."""

    async def all_ways() -> set[str]:
        return {
            kind(),
            await akind(),
            await threaded(True)(),
            await threaded(False)(),
            await sync_to_async(async_to_sync(akind))(),
            *await asyncio.gather(akind(), asyncio.create_task(akind())),
        }

    async def act() -> None:
        with pinning_scope():
            assert await all_ways() == {"replica"}
            with use_primary():
                assert await all_ways() == {"primary"}
                with use_replica():
                    assert await all_ways() == {"replica"}
                assert await all_ways() == {"primary"}
            assert await all_ways() == {"replica"}

    async_to_sync(act)()


@pytest.mark.parametrize("thread_sensitive", [True, False])
def test_block_entered_in_a_thread_ends_with_it(thread_sensitive: bool) -> None:
    decorated = sync_to_async(use_primary(kind), thread_sensitive=thread_sensitive)

    async def act() -> list[str]:
        with pinning_scope():
            return [kind(), await decorated(), kind()]

    assert async_to_sync(act)() == ["replica", "primary", "replica"]


def test_blocks_of_concurrent_tasks_are_isolated() -> None:
    """They are children of one scope, and alternate inside their blocks."""

    async def act() -> None:
        both = asyncio.Barrier(2)

        async def one(verb: Any) -> list[str]:
            seen = []
            await both.wait()
            with verb():
                await both.wait()
                seen.append(await akind())
                await both.wait()
            await both.wait()
            seen.append(await akind())
            return seen

        with pinning_scope():
            found = await asyncio.gather(one(use_primary), one(use_replica))
        assert found == [["primary", "replica"], ["replica", "replica"]]

    async_to_sync(act)()


def test_blocks_of_a_request_and_its_views(visit: Visit) -> None:
    @use_primary
    def inner(request: Any) -> str:
        return kind()

    assert visit(lambda request: (inner(request), kind())) == ("primary", "replica")


@method_decorator(use_primary, name="dispatch")
class PrimaryView(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(kind())


class PrimaryMethodView(View):
    @method_decorator(use_primary())
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(kind())


class AsyncReplicaView(View):
    @method_decorator(use_replica)
    async def post(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(await akind())


@method_decorator(use_primary, name="dispatch")
class AsyncPrimaryView(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(await akind())


class PlainView(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(kind())


class AsyncPlainView(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(await akind())


@use_primary
@use_primary
def rendered(request: HttpRequest) -> TemplateResponse:
    template = Engine().from_string("{{ kind }}")
    return TemplateResponse(request, DjangoTemplate(template), {"kind": kind})


class DjangoTemplate:
    def __init__(self, template: Any) -> None:
        self.template = template

    def render(self, context: Any, request: Any) -> str:
        return str(self.template.render(Context(context)))


@use_replica
def search(request: HttpRequest) -> HttpResponse:
    return HttpResponse(kind())


urlpatterns = [
    path("class/", PrimaryView.as_view()),
    path("async-class/", AsyncPrimaryView.as_view()),
    path("twice/", rendered),
    path("method/", PrimaryMethodView.as_view()),
    path("async-method/", AsyncReplicaView.as_view()),
    path("as-view/", use_primary(PlainView.as_view())),
    path("async-as-view/", use_primary(AsyncPlainView.as_view())),
    path("plain/", PlainView.as_view()),
    path("search/", search),
]


@pytest.mark.urls(__name__)
@pytest.mark.parametrize(
    ("method", "address", "answer"),
    [
        ("get", "/class/", "primary"),
        ("get", "/async-class/", "primary"),
        ("get", "/twice/", "primary"),
        ("get", "/method/", "primary"),
        ("post", "/async-method/", "replica"),
        ("get", "/as-view/", "primary"),
        ("get", "/async-as-view/", "primary"),
        ("get", "/plain/", "replica"),
        ("post", "/search/", "replica"),
    ],
)
def test_views(browser: Browser, method: str, address: str, answer: str) -> None:
    """Class-based views by `method_decorator` and as a whole; a read-only POST."""
    assert getattr(browser, method)(address).content.decode() == answer
    assert not browser.cookies
    assert browser.get("/plain/").content == b"replica"


@pytest.mark.parametrize("verb", [use_primary, use_replica, ignore_writes])
def test_decorating_a_class_raises(verb: Any) -> None:
    with pytest.raises(TypeError, match=r"PlainView is a class. Decorate one of its methods"):
        verb(PlainView)
    with pytest.raises(TypeError, match=r"PlainView is a class"):
        verb()(PlainView)


@pytest.mark.parametrize("verb", [use_primary, use_replica])
@pytest.mark.parametrize("alias", ["replica1", "typo"])
def test_unknown_alias_raises_on_entering_the_block(verb: Any, alias: str) -> None:
    decorated = verb(alias)(kind)
    for enter in (decorated, verb(alias).__enter__):
        with pytest.raises(ValueError, match=rf"'{alias}' is not a primary of PINNING_REPLICAS"):
            enter()
    with pinning_scope():
        assert kind() == "replica"


@override_settings(PINNING_REPLICAS=[])
def test_api_without_pools_does_nothing() -> None:
    with pinning_scope(), use_primary(), use_replica(), ignore_writes():
        pin_this_request()
        unpin_this_request()
        assert where() == "default"


def test_negative_max_lag_or_seconds_raises() -> None:
    with pytest.raises(ValueError, match="max_lag must be a number of seconds"):
        use_replica(max_lag=-1)
    with pytest.raises(ValueError, match="seconds must be a number"):
        pin_this_request(seconds=-1)


@pytest.mark.parametrize(("seconds", "ends"), [(None, 15), (3, 3), (60, 60)])
def test_seconds_of_a_manual_pin(
    visit: Visit, clock: FrozenDateTimeFactory, seconds: float | None, ends: float
) -> None:
    visit(lambda request: pin_this_request(seconds=seconds))
    clock.tick(ends - 0.5)
    assert visit() == "default"
    clock.tick(1)
    assert is_replica(visit())


def test_zero_seconds_pin_the_request_only(visit: Visit) -> None:
    assert visit(lambda request: (pin_this_request(seconds=0), where())[1]) == "default"
    assert is_replica(visit())


def test_reason_of_a_request_that_is_pinned_for_zero_seconds_is_the_manual_pin(
    visit: Visit,
) -> None:
    def act(request: Any) -> list[tuple[str, str]]:
        pin_this_request(seconds=0)
        with capture_reads() as reads:
            Book.objects.count()
            Book.objects.using("replica1").count()
        return [(read.served, read.reason) for read in reads]

    assert visit(act) == [("default", "manual"), ("default", "manual")]


def test_short_manual_pin_does_not_shorten_the_pin_of_a_write(
    visit: Visit, clock: FrozenDateTimeFactory
) -> None:
    visit(lambda request: (Book.objects.create(), pin_this_request(seconds=1)))
    clock.tick(10)
    assert visit() == "default"


def test_unpin_clears_writes_the_method_and_manual_pins(visit: Visit) -> None:
    def action(request: Any) -> list[bool]:
        seen = []
        for cause in (Book.objects.create, pin_this_request):
            cause()
            unpin_this_request()
            seen.append(is_replica(where()) and not is_pinned())
        return seen

    assert visit(action, "post") == [True, True]
    assert not visit.browser.cookies


def test_unpin_affects_neither_blocks_nor_later_writes(visit: Visit) -> None:
    def action(request: Any) -> list[str]:
        with use_primary():
            unpin_this_request()
            seen = [kind()]
        seen.append(kind())
        Book.objects.create()
        return [*seen, kind()]

    assert visit(action) == ["primary", "replica", "primary"]


def test_decorated_generator_runs_inside_the_block_and_its_caller_outside() -> None:
    @use_primary
    def rows() -> Iterator[str]:
        for _ in range(2):
            yield Book.objects.db

    seen = []
    for database in rows():
        seen += [database, Book.objects.db in ("replica1", "replica2")]
    assert seen == ["default", True, "default", True]


def test_decorated_async_generator_runs_inside_the_block_and_its_caller_outside() -> None:
    @use_primary
    async def rows() -> AsyncIterator[str]:
        for _ in range(2):
            yield Book.objects.db

    async def read() -> list[object]:
        seen: list[object] = []
        async for database in rows():
            seen += [database, Book.objects.db in ("replica1", "replica2")]
        return seen

    assert async_to_sync(read)() == ["default", True, "default", True]
