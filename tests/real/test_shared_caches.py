"""nginx as a shared cache in front of the site: it stores pages, but none with a client's pin."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.servers.basehttp import ThreadedWSGIServer
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.test import override_settings
from django.test.testcases import QuietWSGIRequestHandler

from tests.app.models import Book

from .layouts.daemons import nginx
from .sample import Client

pytestmark = [pytest.mark.real, pytest.mark.django_db(transaction=True, databases="__all__")]

STORES = ["pinning_middleware.stores.CookieStore", "pinning_middleware.stores.HeaderStore"]


@pytest.fixture
def site() -> Iterator[str]:
    """Serve the site on a port of its own."""
    with (
        override_settings(ALLOWED_HOSTS=["*"], PINNING_STORES=STORES),
        ThreadedWSGIServer(("127.0.0.1", 0), QuietWSGIRequestHandler) as server,
    ):
        server.set_app(get_wsgi_application())
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("ignored", [(), ("Set-Cookie", "Vary")], ids=["default", "careless"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Cache-Control": "public, max-age=600"},
        {"Cache-Control": "s-maxage=600"},
        {"X-Accel-Expires": "600"},
        {"Expires": "Thu, 31 Dec 2099 00:00:00 GMT"},
    ],
    ids=lambda headers: next(iter(headers.values()), "no header"),
)
def test_nginx_stores_no_page_with_a_pin(
    site: str, do: Callable[..., str], headers: dict[str, str], ignored: tuple[str, ...]
) -> None:
    served: list[str] = []

    def view(request: Any) -> HttpResponse:
        if not served:
            Book.objects.create(title="x")
        served.append("page")
        return HttpResponse(f"page {len(served)}", headers=headers)

    path = f"/sync/{do(view)}/"
    with nginx(site, *ignored) as url:
        first, second, third = (Client(url).get(path) for _ in range(3))
    assert first.headers["Pinning-Token"] in first.headers["Set-Cookie"]
    for other in (second, third):
        assert other.text == "page 2", "stored when it had no pin"
        assert "Set-Cookie" not in other.headers
        assert "Pinning-Token" not in other.headers
