"""A row that a lagging replica of PostgreSQL does not have yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.shortcuts import get_object_or_404
from django.test import override_settings

from pinning_middleware.reasons import Reason
from pinning_middleware.utils import counters
from tests.app.models import Book
from tests.conftest import Browser
from tests.real.conftest import PostgreSQL

pytestmark = pytest.mark.real


def create(request: Any) -> str:
    return str(Book.objects.create(title="new").pk)


def find(request: Any) -> str:
    return str(get_object_or_404(Book, title="new").title)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_reader_of_a_paused_replica_finds_what_another_browser_wrote(
    pg: PostgreSQL,
    new_browser: Callable[..., Browser],
    do: Callable[[Callable[..., Any]], str],
    kind: str,
) -> None:
    pg.pause()
    writer, reader, path = new_browser(), new_browser(), f"/{kind}/{do(find)}/"
    writer.post(f"/{kind}/{do(create)}/")
    assert reader.get(path).status_code == 404
    counters.reads.clear()
    with override_settings(PINNING_RETRY_404=True):
        assert reader.get(path).content == b"new"
        assert {reason for _, alias, _, reason in counters.reads if alias == "pg"} == {
            Reason.RETRY_404
        }
        pg.resume()
        counters.reads.clear()
        assert reader.get(path).content == b"new"
        assert {alias for _, alias, _, _ in counters.reads} < {"pg1", "pg2"}


def test_view_is_retried_under_monotonic_reads(
    pg: PostgreSQL, new_browser: Callable[..., Browser], do: Callable[[Callable[..., Any]], str]
) -> None:
    """The first read of a request changes its outgoing pins, but is no write."""
    pg.pause()
    new_browser().post(f"/sync/{do(create)}/")
    with override_settings(PINNING_RETRY_404=True, PINNING_CONSISTENCY="monotonic-reads"):
        assert new_browser().get(f"/sync/{do(find)}/").content == b"new"
