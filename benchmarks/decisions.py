"""A routing decision and a request, beside django-multidb-router 0.11. No database is asked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.settings")
django.setup()

from django.db import router  # noqa: E402
from django.db.utils import ConnectionRouter  # noqa: E402
from django.http import HttpRequest, HttpResponse  # noqa: E402
from django.test import RequestFactory  # noqa: E402

from pinning_middleware import pin_this_request  # noqa: E402
from pinning_middleware.middleware import PinningMiddleware  # noqa: E402
from pinning_middleware.scopes.scope import Scope, enter  # noqa: E402

from .measure import compare  # noqa: E402
from .models import Entry  # noqa: E402

warnings.simplefilter("ignore")
from multidb import PinningReplicaRouter  # noqa: E402
from multidb.middleware import PinningRouterMiddleware  # noqa: E402
from multidb.pinning import mark_as_write, unpin_this_thread  # noqa: E402


def requests(
    middleware: Callable[..., Any], view: Callable[[HttpRequest], HttpResponse]
) -> Callable[[], object]:
    handler = middleware(view)
    request = RequestFactory().get("/")
    return lambda: handler(request)


def main() -> None:
    their_router = ConnectionRouter([PinningReplicaRouter()])
    ours, theirs = PinningMiddleware, PinningRouterMiddleware
    enter(Scope())
    # As their middleware leaves it; an attribute that is missing would cost them twice as much.
    unpin_this_thread()
    print(
        "a decision inside a request:  ",
        compare(lambda: router.db_for_read(Entry), lambda: their_router.db_for_read(Entry), 5000),
    )
    enter(None)

    def plain(request: HttpRequest) -> HttpResponse:
        return RESPONSE

    print(
        "a GET through the middleware: ",
        compare(requests(ours, plain), requests(theirs, plain), 2000),
    )

    def five(chosen: ConnectionRouter) -> Callable[[HttpRequest], HttpResponse]:
        def view(request: HttpRequest) -> HttpResponse:
            for _ in range(5):
                chosen.db_for_read(Entry)
            return RESPONSE

        return view

    print(
        "a GET with five decisions:    ",
        compare(requests(ours, five(router)), requests(theirs, five(their_router)), 2000),
    )

    def pinning(request: HttpRequest) -> HttpResponse:
        pin_this_request()
        return HttpResponse()

    def marking(request: HttpRequest) -> HttpResponse:
        return mark_as_write(HttpResponse())  # type: ignore[no-any-return]

    print(
        "a request that sets a cookie: ",
        compare(requests(ours, pinning), requests(theirs, marking), 1000),
    )


RESPONSE = HttpResponse()

if __name__ == "__main__":
    main()
