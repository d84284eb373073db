"""
A routing decision and a request, beside django-multidb-router 0.11; and decisions that more
settings have a say in, beside a plain one. No database is asked.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.settings")
django.setup()

from django.db import router  # noqa: E402
from django.db.utils import ConnectionRouter  # noqa: E402
from django.http import HttpRequest, HttpResponse  # noqa: E402
from django.test import RequestFactory, override_settings  # noqa: E402

from pinning_middleware import offload, pin_this_request  # noqa: E402
from pinning_middleware.middleware import PinningMiddleware  # noqa: E402
from pinning_middleware.scopes.scope import Scope, enter  # noqa: E402

from .measure import ROUNDS, compare, fastest, ratio  # noqa: E402
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


SETTINGS: Mapping[str, Mapping[str, object]] = {
    "  PINNING_PRIMARY_MODELS:": {"PINNING_PRIMARY_MODELS": ["auth", "shop.Order"]},
    "  PINNING_OFFLOAD, offload():": {"PINNING_OFFLOAD": False},
    "  PINNING_OFFLOAD, a function:": {"PINNING_OFFLOAD": "benchmarks.decisions.all_of_them"},
}


def all_of_them(request: HttpRequest) -> bool:
    return True


def among(chosen: Mapping[str, object]) -> str:
    """Compare decisions under these settings with plain ones, each in a scope of its own."""

    def timed() -> float:
        scope = Scope()
        scope.ask_offload = lambda: all_of_them(HttpRequest())
        enter(scope)
        try:
            return fastest(lambda: router.db_for_read(Entry), TIMES)
        finally:
            enter(None)

    pairs = []
    for _ in range(ROUNDS):
        plain = timed()
        lifts = chosen.get("PINNING_OFFLOAD") is False
        with override_settings(**chosen), offload() if lifts else nullcontext():
            # What follows a change of settings is not of a decision.
            timed()
            pairs.append((timed(), plain))
    return ratio(pairs)


def main() -> None:
    their_router = ConnectionRouter([PinningReplicaRouter()])
    ours, theirs = PinningMiddleware, PinningRouterMiddleware
    enter(Scope())
    # As their middleware leaves it; an attribute that is missing would cost them twice as much.
    unpin_this_thread()
    print(
        "a decision inside a request:  ",
        compare(lambda: router.db_for_read(Entry), lambda: their_router.db_for_read(Entry), TIMES),
    )
    enter(None)
    for name, chosen in SETTINGS.items():
        print(f"{name:30}", among(chosen))

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
TIMES = 5000

if __name__ == "__main__":
    main()
