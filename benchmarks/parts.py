"""
Where the time of a request with one query goes: the time that each part of the package takes in it,
without the parts inside it, on a real cluster.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from .fleet import site
from .overhead import KINDS, PACKAGE, Site

ROUNDS = int(os.environ.get("ROUNDS", "40"))
# The rest of a request: the view, Django, the driver and the servers.
REST: Final = ""
# Each part, and its functions: a module, and a name in it.
PARTS: Final = {
    "the scope, until the response is closed": (
        ("pinning_middleware.middleware", "PinningMiddleware.__call__"),
        ("pinning_middleware.middleware", "_PostResponse.__enter__"),
        ("pinning_middleware.middleware", "_PostResponse.__exit__"),
    ),
    "the client's pins": (("pinning_middleware.middleware", "PinningMiddleware.load_pins"),),
    "the hook before the view": (
        ("pinning_middleware.middleware", "PinningMiddleware.prepare_view"),
    ),
    "the routing decision": (
        ("pinning_middleware.routers", "PinningRouter.db_for_read"),
        ("pinning_middleware.routers", "PinningRouter.db_for_write"),
    ),
    "opening the cursor": (
        ("pinning_middleware.backend.connection", "InstrumentedConnection._cursor"),
    ),
    "classifying the statement": (("pinning_middleware.backend.execute", "classify"),),
    "admission, retries, recording a write": (("pinning_middleware.backend.execute", "_execute"),),
    "counting the read": (("pinning_middleware.backend.execute", "record_read"),),
    "a probe, with its round trip": (("pinning_middleware.routing.health", "probe"),),
    "tracking the write on the replicas": (("pinning_middleware.routing.pool", "Pool.track"),),
    "making the pin": (("pinning_middleware.middleware", "PinningMiddleware.save_pins"),),
    "signing and setting the cookie": (
        ("pinning_middleware.stores.token_stores", "CookieStore.save"),
    ),
    REST: (
        ("pinning_middleware.middleware", "PinningMiddleware.respond"),
        ("django.db.backends.base.base", "BaseDatabaseWrapper._cursor"),
        ("django.db.backends.utils", "CursorWrapper._execute"),
    ),
}


class Timed(Site):
    """A site that adds up the time of each part in each request."""

    def __init__(self) -> None:
        # By the request's method, for each request: the seconds of each part.
        self.requests: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        # The seconds of the parts that have run inside each part that is running.
        self._inner: list[float] = []
        for part, functions in PARTS.items():
            for module, name in functions:
                owner: Any = import_module(module)
                *path, name = name.split(".")
                owner = functools.reduce(getattr, path, owner)
                setattr(owner, name, self._timed(part, getattr(owner, name)))
        # Django's handler refers to methods of the middleware from its beginning.
        super().__init__(PACKAGE)

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self._seconds[part] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return timed

    def _request(self, method: str) -> float:
        self._seconds.clear()
        seconds = super()._request(method)
        self.requests[method].append({**self._seconds})
        return seconds


def main() -> None:
    from pinning_middleware.servers import monitor

    with site():
        timed = Timed()
        for kind in KINDS:
            _measure(timed, kind)
        monitor.stop()


def _measure(timed: Timed, kind: str) -> None:
    timed.block(kind)
    timed.requests.clear()
    for _ in range(ROUNDS):
        timed.block(kind)
    rows = timed.requests["POST" if kind == "write" else "GET"]
    middles = {
        part: statistics.median(row.get(part, 0.0) for row in rows) for part in PARTS if part
    }
    print(f"{kind}: {sum(middles.values()) * 1e6:.0f} µs")
    for part, seconds in middles.items():
        if seconds:
            print(f"    {part:40} {seconds * 1e6:6.1f} µs", flush=True)


if __name__ == "__main__":
    main()
