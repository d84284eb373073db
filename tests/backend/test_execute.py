"""The decision that a statement follows, from the router to the counted read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pinning_middleware import pinning_scope
from pinning_middleware.testing import capture_reads
from tests.app.models import Book
from tests.conftest import is_replica

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@pytest.fixture(autouse=True)
def scope() -> Iterator[None]:
    with pinning_scope(isolated=True):
        yield


def test_routed_read_is_counted_under_the_reason_of_its_decision() -> None:
    with capture_reads() as reads:
        Book.objects.first()
    (read,) = reads
    assert is_replica(read.alias)
    assert read.reason == "round_robin"


def test_read_of_an_alias_that_the_router_named_before_is_explicit() -> None:
    with pinning_scope(isolated=True), capture_reads() as reads:
        alias = Book.objects.all().db
        Book.objects.using(alias).first()
        list(Book.objects.using(alias).iterator())
        Book.objects.first()
    assert [read.reason for read in reads] == ["explicit", "explicit", "round_robin"]


def test_read_of_an_alias_that_the_code_named_is_explicit() -> None:
    with capture_reads() as reads:
        Book.objects.using("replica1").first()
        Book.objects.using("default").first()
    assert [(read.alias, read.reason) for read in reads] == [
        ("replica1", "explicit"),
        ("default", "explicit"),
    ]
