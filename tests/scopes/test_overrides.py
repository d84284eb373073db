"""Overrides are stored in a context variable of their own."""

from __future__ import annotations

import contextvars
import gc
import pickle
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.template import engines
from django.template.response import SimpleTemplateResponse
from django.test import override_settings

from pinning_middleware import (
    ignore_writes,
    offload,
    offload_this_request,
    pin_this_request,
    pinning_scope,
    unpin_this_request,
    use_primary,
    use_replica,
)
from pinning_middleware.backend.execute import execute_wrapper
from pinning_middleware.scopes.overrides import current_overrides
from tests.app.models import Author, Book, OwnBook, Tag
from tests.conftest import Browser, Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


def test_late_collected_generator_does_not_pop_overrides() -> None:
    def parts() -> Iterator[int]:
        with use_primary():
            yield 1
            yield 2

    def first_request() -> Iterator[int]:
        generator = parts()
        next(generator)
        return generator

    generator = contextvars.copy_context().run(first_request)
    with use_replica(), pinning_scope():
        pin_this_request()
        assert is_replica(where())
        del generator
        gc.collect()
        assert is_replica(where())
    assert current_overrides() is None


def test_exiting_an_outer_block_ends_inner_blocks() -> None:
    outer, inner = use_primary(), ignore_writes()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert current_overrides() is None
    assert is_replica(where())
    inner.__exit__(None, None, None)
    assert current_overrides() is None


def test_decorated_generator_supports_send_throw_and_return() -> None:
    @use_primary
    def parts() -> Generator[str, str, str]:
        got = yield where()
        try:
            yield got
        except LookupError:
            got = where()
        yield got
        return where()

    generator = parts()
    assert next(generator) == "default"
    assert is_replica(where())
    assert generator.send("sent") == "sent"
    assert generator.throw(LookupError()) == "default"
    with pytest.raises(StopIteration) as stopped:
        next(generator)
    assert stopped.value.value == "default"


def test_decorated_generator_is_closed_inside_its_block() -> None:
    seen = []

    @use_primary
    def parts() -> Iterator[int]:
        try:
            yield 1
        finally:
            seen.append(where())

    generator = parts()
    next(generator)
    generator.close()
    assert seen == ["default"]


def test_decorated_async_generator_supports_send_and_throw() -> None:
    seen: list[Any] = []

    @use_primary
    async def parts() -> AsyncIterator[Any]:
        got = yield await sync_to_async(where)()
        try:
            yield got
        except LookupError:
            yield await sync_to_async(where)()

    async def main() -> None:
        generator: Any = parts()
        seen.append(await anext(generator))
        seen.append(await generator.asend("sent"))
        seen.append(await generator.athrow(LookupError()))
        await generator.aclose()

    async_to_sync(main)()
    assert seen == ["default", "sent", "default"]


def template(text: str) -> Any:
    return engines["django"].from_string(text)


TEMPLATES = override_settings(
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}]
)


@TEMPLATES
def test_template_response_is_rendered_inside_the_block_of_its_view() -> None:
    @use_primary
    def view(request: HttpRequest) -> SimpleTemplateResponse:
        return SimpleTemplateResponse(template("{{ where }}"), {"where": where})

    response = view(HttpRequest())
    assert is_replica(where())
    assert response.render().content == b"default"
    assert pickle.loads(pickle.dumps(response)).content == b"default"


def test_streaming_content_is_generated_inside_the_block_of_its_view() -> None:
    @use_primary
    def view(request: HttpRequest) -> StreamingHttpResponse:
        return StreamingHttpResponse(where() for _ in range(2))

    response = view(HttpRequest())
    parts = iter(response)
    assert next(parts) == b"default"
    assert is_replica(where())
    assert next(parts) == b"default"


def test_block_in_a_streaming_generator_applies_to_all_chunks(visit: Visit, do: Any) -> None:
    seen = []

    def parts() -> Iterator[str]:
        yield where()
        with use_primary():
            try:
                yield where()
                yield where()
            finally:
                seen.append(where())
        yield where()

    if visit.browser.is_async or visit.kind == "async":
        return
    response = visit.browser.get(f"/sync/{do(lambda r: StreamingHttpResponse(parts()))}/")
    outside = []
    found = []
    for part in response.streaming_content:
        found.append(part.decode())
        outside.append(current_overrides())
    assert found[1:3] == ["default", "default"]
    assert is_replica(found[0])
    assert found[3] == found[0]
    assert seen == ["default"]
    assert outside == [None] * 4


# offload


def test_offload_overrides_only_the_method(visit: Visit) -> None:
    @offload
    def reads(request: Any) -> str:
        return where()

    @offload()
    def writes(request: Any) -> str:
        Book.objects.create(title="x")
        return where()

    assert visit(method="post") == "default"
    assert is_replica(visit(reads, "post"))
    assert visit(writes, "post") == "default"
    assert visit(reads, "post") == "default", "its user has written"


def test_offload_this_request(visit: Visit) -> None:
    def action(request: Any) -> tuple[str, str]:
        before = where()
        offload_this_request()
        return before, where()

    before, after = visit(action, "post")
    assert before == "default"
    assert is_replica(after)


@override_settings(PINNING_OFFLOAD=False)
def test_only_marked_views_are_offloaded(visit: Visit) -> None:
    assert visit() == "default"

    def marked(request: Any) -> str:
        with offload():
            return where()

    assert is_replica(visit(marked))
    assert visit(lambda request: (marked(request), where())[1]) == "default"
    assert not visit.browser.cookies


ASKED: list[Any] = []


def for_staff(request: Any) -> bool:
    ASKED.append((request.path, where()))
    return "staff" in request.GET


async def afor_staff(request: Any) -> bool:
    return for_staff(request)


@pytest.mark.parametrize("name", ["for_staff", "afor_staff"])
def test_offload_predicate_that_cannot_run_in_an_event_loop_is_called_by_a_later_read(
    browser: Browser, do: Callable[..., str], name: str
) -> None:
    """Django chooses the database of aiterator() in the loop's own thread."""
    served: list[str] = []

    async def act(request: Any) -> str:
        async for _ in Book.objects.aiterator():
            pass
        served.append(await sync_to_async(where)())
        return "done"

    ASKED.clear()
    with override_settings(PINNING_OFFLOAD=f"{__name__}.{name}"):
        assert browser.get(f"/async/{do(act)}/", {"staff": "1"}).status_code == 200
    assert is_replica(served.pop())
    assert len(ASKED) == 1


@pytest.mark.parametrize("name", ["for_staff", "afor_staff"])
def test_offload_predicate_is_called_once_and_only_if_needed(visit: Visit, name: str) -> None:
    ASKED.clear()
    with override_settings(PINNING_OFFLOAD=f"{__name__}.{name}"):
        assert visit(lambda request: [where(), where()]) == ["default", "default"]
        assert len(ASKED) == 1
        assert ASKED[0][1] == "default", "what it reads itself is the primary's"
        ASKED.clear()
        visit(lambda request: "reads nothing")
        assert ASKED == []
        served = visit(lambda request: {where() for _ in range(3)}, data={"staff": "1"})
        assert len(served) == 1
        assert is_replica(served.pop())
        assert len(ASKED) == 1


@override_settings(PINNING_OFFLOAD_OUTSIDE_REQUESTS=False)
def test_models_of_the_primary_outside_a_scope() -> None:
    assert where() == "default"
    with offload():
        assert is_replica(where())
    with pinning_scope():
        assert is_replica(where())


@pytest.mark.parametrize("label", ["app.Book", "app", "APP.book"])
def test_models_of_the_primary(visit: Visit, label: str) -> None:
    with override_settings(PINNING_PRIMARY_MODELS=[label]):
        assert visit() == "default"
        others = visit(lambda request: where("Author"))
        assert is_replica(others) is ("." in label)
        assert visit(lambda request: Book.objects.count()) == 0

        def stale(request: Any) -> str:
            with use_replica():
                return where()

        assert is_replica(visit(stale))


@pytest.mark.parametrize("label", ["app.Book", "app.OwnBook", "app"])
def test_proxy_of_a_primary_model_reads_the_primary(visit: Visit, label: str) -> None:
    with override_settings(PINNING_PRIMARY_MODELS=[label]):
        assert visit(lambda request: where("OwnBook")) == "default"
        assert is_replica(visit()) is (label == "app.OwnBook")


def test_transaction_takes_precedence_over_overrides(visit: Visit) -> None:
    from django.db import transaction

    @offload
    def action(request: Any) -> str:
        with transaction.atomic():
            return where()

    assert visit(action, "post") == "default"


def test_instances_have_the_alias_of_the_primary(visit: Visit, named: Any) -> None:
    """save() updates the loaded fields only, not stale values of other columns."""
    named()

    def action(request: Any) -> tuple[Any, ...]:
        book = Book.objects.only("title").get()
        other = Author.objects.create(name="new")
        book.title = f"changed {book.title}"
        book.save()
        other.book_set.add(book)
        return book._state.db, str(Book.objects.get()), Book.objects.get().author_id

    database, title, author = visit(action)
    assert database == "default"
    assert title.startswith("changed replica")
    assert author is not None


def test_models_with_custom_from_db(named: Any) -> None:
    named()
    with pinning_scope(isolated=True):
        book = OwnBook.objects.get()
        assert str(book).startswith("replica")
        assert book._state.db == "default"


def test_write_guard_is_the_outermost_wrapper() -> None:
    """Also for connections that were created before the app was ready."""
    for alias in ("default", "replica1", "users"):
        connections[alias].ensure_connection()
        assert connections[alias].execute_wrappers[0] is execute_wrapper


def test_pickled_instance_is_valid_after_a_change_of_replicas(named: Any) -> None:
    named()
    with pinning_scope(isolated=True):
        kept = pickle.dumps(Book.objects.get())
    with override_settings(PINNING_REPLICAS=["elsewhere"]):
        book = pickle.loads(kept)
        assert book._state.db == "default"
        book.save()


def test_decorated_view_returns_the_same_response() -> None:
    @use_primary
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(where())

    assert view(HttpRequest()).content == b"default"


@override_settings(PINNING_OFFLOAD=False)
def test_offload_result_is_cached_while_valid() -> None:
    with pinning_scope():
        with offload():
            first = where()
            assert is_replica(first)
            assert where() == first
            with transaction.atomic():
                assert where() == "default"
            assert where() == first
            with use_primary():
                assert where() == "default"
            assert where() == first
            with offload():
                assert where() == first
        assert where() == "default"
        with offload():
            assert where() == first
            Tag.objects.create(name="a")
            assert where() == "default"
            unpin_this_request()
            assert is_replica(where())
