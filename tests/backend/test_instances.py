"""Instances that were read from a replica and are saved to the primary."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import django
import pytest
from asgiref.sync import async_to_sync
from django.db.models import Model
from django.db.models.signals import post_save, pre_save

from pinning_middleware import pinning_scope
from pinning_middleware.testing import capture_reads
from tests.app.models import Author, Book, OwnBook, Tag
from tests.conftest import change_behind, is_replica, saved, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@pytest.fixture(autouse=True)
def rows(named: Callable[..., None]) -> Iterator[None]:
    """Give each database other values, so that a value tells where it was read."""
    named()
    with pinning_scope(isolated=True):
        yield


def primary_title() -> str:
    return Book.objects.using("default").values_list("title", flat=True).get(pk=1)


@pytest.mark.parametrize("model", [Book, OwnBook])
def test_instance_from_a_replica_belongs_to_the_primary(model: type[Model]) -> None:
    assert is_replica(where())
    instance = model._default_manager.get(pk=1)
    assert instance.title in ("replica1", "replica2")  # type: ignore[attr-defined]
    assert saved(instance) == "default"
    assert saved(pickle.loads(pickle.dumps(instance))) == "default"


def test_instance_named_by_alias_belongs_to_the_primary() -> None:
    assert saved(Book.objects.using("replica1").get(pk=1)) == "default"
    assert saved(Book.objects.using("elsewhere").create(title="x")) == "elsewhere"


def test_save_of_deferred_columns_writes_the_values_of_the_primary() -> None:
    book = Book.objects.only("pk").get(pk=1)
    assert book.get_deferred_fields() == {"title", "author_id"}
    with capture_reads() as reads:
        book.save()
    assert primary_title() == "default"
    assert {(read.alias, read.reason) for read in reads} == {("default", "wrote")}


def test_save_of_some_columns_writes_only_those() -> None:
    book = Book.objects.only("title").get(pk=1)
    Book.objects.using("default").filter(pk=1).update(author=None)
    book.title = "changed"
    book.save()
    changed = Book.objects.using("default").get(pk=1)
    assert (changed.title, changed.author_id) == ("changed", None)


def test_asave_of_deferred_columns_writes_the_values_of_the_primary() -> None:
    async def work() -> None:
        book = await Book.objects.only("pk").aget(pk=1)
        await book.asave()

    async_to_sync(work)()
    assert primary_title() == "default"


@pytest.fixture
def names_read_by_receivers() -> Iterator[list[str]]:
    names: list[str] = []

    def receive(instance: Any, **kwargs: Any) -> None:
        names.append(Author.objects.get(pk=1).name)

    for signal in (pre_save, post_save):
        signal.connect(receive, Book)
    yield names
    for signal in (pre_save, post_save):
        signal.disconnect(receive, Book)


def test_receivers_of_pre_save_and_post_save_read_the_primary(
    names_read_by_receivers: list[str],
) -> None:
    book = Book.objects.get(pk=1)
    with capture_reads() as reads:
        book.save()
    assert names_read_by_receivers == ["default", "default"]
    assert [(read.alias, read.reason) for read in reads] == [("default", "wrote")] * 2


def test_receivers_read_the_primary_while_a_new_instance_is_saved(
    names_read_by_receivers: list[str],
) -> None:
    with capture_reads() as reads:
        Book.objects.create(title="new")
    assert names_read_by_receivers == ["default", "default"]
    assert {read.reason for read in reads} == {"wrote"}


def test_failed_save_leaves_reads_on_replicas() -> None:
    def fail(**kwargs: Any) -> None:
        raise LookupError

    pre_save.connect(fail, Book)
    try:
        with pytest.raises(LookupError):
            Book(title="x").save()
    finally:
        pre_save.disconnect(fail, Book)
    assert is_replica(where())


def test_save_outside_the_pool_leaves_reads_on_replicas() -> None:
    served: list[str] = []

    def receive(**kwargs: Any) -> None:
        served.append(where())

    pre_save.connect(receive, Tag)
    try:
        Tag(name="x").save(using="elsewhere")
    finally:
        pre_save.disconnect(receive, Tag)
    assert all(map(is_replica, served))


def test_instance_from_a_replica_is_added_to_a_relation_of_the_primary() -> None:
    book = Book.objects.using("default").get(pk=1)
    book.tags.clear()
    book.tags.add(Tag.objects.using("replica1").get(pk=1))
    assert book.tags.using("default").count() == 1


def peers() -> list[Book]:
    """Read two books whose titles are deferred, and fetched for all together."""
    from django.db.models import FETCH_PEERS  # type: ignore[attr-defined]

    for alias in ("default", "replica1", "replica2"):
        change_behind(alias, f"INSERT INTO app_book (id, title) VALUES (2, '{alias}')")
    return list(Book.objects.only("pk").fetch_mode(FETCH_PEERS))  # type: ignore[attr-defined]


@pytest.mark.skipif(django.VERSION < (6, 1), reason="needs Django 6.1")
def test_fetch_peers_reads_where_the_scope_reads() -> None:
    with capture_reads() as reads:
        books = peers()
        titles = {book.title for book in books}
    assert [read.role for read in reads] == ["replica", "replica"]
    assert titles == {reads[0].served}
    assert {saved(book) for book in books} == {"default"}
