"""A site that names its replica by using() in each query and has no db_for_read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connections
from django.test import override_settings

from pinning_middleware import use_primary, use_replica
from pinning_middleware.testing import capture_reads
from tests.app.models import Book
from tests.conftest import Visit
from tests.contrib.pages import DOCS, blocks

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")
SETTINGS: dict[str, Any] = {}
for block in blocks(DOCS / "how-to" / "coming-from.md"):
    if block.heading == '`using("replica")` everywhere':
        exec(block.code, {"Order": Book}, SETTINGS)
SITE = {name: SETTINGS[name] for name in SETTINGS if name.startswith(("PINNING", "DATABASE"))}


@pytest.fixture(autouse=True)
def site() -> Iterator[None]:
    """The settings of the section "using("replica") everywhere"."""
    with override_settings(**SITE):
        yield


def named_read(request: Any) -> list[tuple[str, str, str]]:
    with capture_reads() as reads:
        book = Book.objects.using("replica1").get()
        str(book.author)
    return [(read.alias, read.served, read.reason) for read in reads]


def test_post_reads_the_named_replica_and_its_relations_from_the_primary(
    visit: Visit, named: Callable[..., None]
) -> None:
    named("default", "replica1")
    assert visit(named_read, "post") == [
        ("replica1", "replica1", "explicit"),
        ("default", "default", "http_method"),
    ]


@override_settings(PINNING_OFFLOAD=True, PINNING_PRIMARY_METHODS=())
def test_offloaded_post_reads_relations_from_the_replica(
    visit: Visit, named: Callable[..., None]
) -> None:
    named("default", "replica1")
    assert [served for _, served, _ in visit(named_read, "post")] == ["replica1", "replica1"]


def test_named_replica_is_the_primary_after_a_write(visit: Visit) -> None:
    def act(request: Any) -> int:
        Book.objects.create()
        return Book.objects.using("replica1").count()

    assert visit(act, "post") == 1


def test_named_replica_serves_inside_use_replica_after_a_write(visit: Visit) -> None:
    def act(request: Any) -> list[str]:
        Book.objects.create()
        with use_replica(), capture_reads() as reads:
            Book.objects.using("replica1").count()
        with use_primary(), capture_reads() as others:
            Book.objects.using("replica1").count()
        return [read.served for read in (*reads, *others)]

    assert visit(act) == ["replica1", "default"]


def test_mirror_tells_which_alias_was_meant(
    visit: Visit, named: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    named("default", "replica1")
    connections["replica1"].close()
    monkeypatch.setitem(
        connections.settings["replica1"], "NAME", connections.settings["default"]["NAME"]
    )
    (first, second) = visit(named_read)
    assert first[0] == "replica1"
    assert second[:2] == ("default", "default")
