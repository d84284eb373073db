"""What a request costs with the package, beside the same request without it, on a real cluster."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from .fleet import site

PASSES = int(os.environ.get("PASSES", "400"))


class ByTurns:
    """Reads replicas by turns and writes the primary, and does nothing else."""

    turns = itertools.cycle(["replica1", "replica2"])

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return next(self.turns)

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "default"


def main() -> None:
    with site() as cluster:
        from django.http import HttpRequest, HttpResponse
        from django.test import RequestFactory

        from pinning_middleware import tokens
        from pinning_middleware.middleware import PinningMiddleware
        from pinning_middleware.scopes.scope import enter

        from .models import Entry

        def read(request: HttpRequest) -> HttpResponse:
            return HttpResponse(str(Entry.objects.filter(pk=1).count()))

        def write(request: HttpRequest) -> HttpResponse:
            Entry.objects.create(client=str(next(numbers)), number=1)
            return HttpResponse()

        factory, numbers = RequestFactory(), itertools.count()

        def new(method: str, cookie: str = "") -> Any:
            request = getattr(factory, method)("/")
            if cookie:
                request.COOKIES["pinning"] = cookie
            return request

        from django.db import router as chosen
        from django.db.utils import ConnectionRouter

        ours, fixed = ConnectionRouter(), ConnectionRouter([ByTurns()])

        def timed(handler: Callable[[Any], Any], routers: ConnectionRouter, request: Any) -> float:
            chosen.__dict__["routers"] = routers.routers
            enter(None)
            started = time.perf_counter()
            handler(request)
            return time.perf_counter() - started

        def compare(name: str, view: Any, method: str, cookies: Callable[[], str]) -> None:
            pinning, pairs = PinningMiddleware(view), []
            for number in range(PASSES + 20):
                cookie = cookies()
                theirs = timed(view, fixed, new(method, cookie))
                mine = timed(pinning, ours, new(method, cookie))
                if number >= 20:
                    pairs.append((mine, theirs))
            mine, theirs = (statistics.median(one) for one in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            print(
                f"{name:20} {mine * 1e6:7.0f} µs  beside {theirs * 1e6:7.0f} µs: {ratio:.2f} times",
                flush=True,
            )

        def token() -> str:
            response = PinningMiddleware(write)(new("get"))
            cluster.wait_caught_up()
            return str(response.cookies["pinning"].value)

        kept = ""

        def same() -> str:
            nonlocal kept
            kept = kept or token()
            return kept

        compare("unpinned read", read, "get", lambda: "")
        compare("write", write, "post", lambda: "")
        compare("first pinned read", read, "get", token)
        compare("later pinned reads", read, "get", same)
        assert not tokens.rejected


if __name__ == "__main__":
    main()
