"""Django's cache of pages never passes a client's pin on to another client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.http import HttpResponse
from django.test import override_settings
from django.views.decorators.cache import cache_page

from tests.app.models import Book
from tests.conftest import MIDDLEWARE, Browser

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

UPDATE = "django.middleware.cache.UpdateCacheMiddleware"
FETCH = "django.middleware.cache.FetchFromCacheMiddleware"
ORDERS = {
    "first": [MIDDLEWARE, UPDATE, FETCH],
    "between": [UPDATE, MIDDLEWARE, FETCH],
    "last": [UPDATE, FETCH, MIDDLEWARE],
    "decorated": [MIDDLEWARE],
}
STORES = ["pinning_middleware.stores.CookieStore", "pinning_middleware.stores.HeaderStore"]


@pytest.mark.parametrize("headers", [{}, {"Cookie": "theme=dark"}], ids=["new", "with a cookie"])
@pytest.mark.parametrize("order", ORDERS)
def test_cached_page_has_no_pin_of_the_client_that_wrote(
    new_browser: Callable[..., Browser], do: Callable[..., str], order: str, headers: Any
) -> None:
    written: list[str] = []

    def view(request: Any) -> HttpResponse:
        if not written:
            Book.objects.create(title="x")
        written.append(request.headers["Client"])
        return HttpResponse("page")

    address = f"/sync/{do(cache_page(60)(view) if order == 'decorated' else view)}/"

    def get(client: str) -> Any:
        return new_browser().get(address, headers={"Client": client, **headers})

    with override_settings(MIDDLEWARE=ORDERS[order], PINNING_STORES=STORES):
        first = get("first")
        others = [get("second"), get("third")]
    assert first.cookies["pinning"].value == first.headers["Pinning-Token"]
    assert "private" in first.headers["Cache-Control"]
    for response in others:
        assert response.content == b"page"
        assert not response.cookies
        assert "Pinning-Token" not in response.headers
    # The second page may be stored, the first one only before it had a pin.
    stores_before_pins = order in ("first", "decorated")
    assert written == (["first"] if stores_before_pins else ["first", "second"])


@pytest.mark.parametrize("order", ["between", "last"])
def test_page_is_cached_outside_the_middleware(
    new_browser: Callable[..., Browser], do: Callable[..., str], order: str
) -> None:
    """Django pickles the response before it is closed."""
    served: list[str] = []
    address = f"/sync/{do(lambda request: served.append('page') or HttpResponse('page'))}/"
    with override_settings(MIDDLEWARE=ORDERS[order]):
        pages = [new_browser().get(address) for _ in range(3)]
    assert [page.content for page in pages] == [b"page"] * 3
    assert served == ["page"]
