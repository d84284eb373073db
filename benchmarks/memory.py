"""Memory of the process after a million requests of ten thousand users."""

from __future__ import annotations

import gc
import os
import random
import resource
from pathlib import Path

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.settings")
django.setup()

from django.db import router  # noqa: E402
from django.http import HttpRequest, HttpResponse  # noqa: E402

from pinning_middleware import pin_this_request  # noqa: E402
from pinning_middleware.middleware import PinningMiddleware  # noqa: E402

from .models import Entry  # noqa: E402

USERS = 10_000
REQUESTS = 1_000_000
WARM_UP = 100_000


def view(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        pin_this_request()
    router.db_for_read(Entry)
    return HttpResponse()


def run(times: int, cookies: dict[int, str]) -> None:
    handler = PinningMiddleware(view)
    for _ in range(times):
        user = random.randrange(USERS)
        request = HttpRequest()
        request.method = "POST" if random.random() < 0.1 else "GET"
        if user in cookies:
            request.COOKIES["pinning"] = cookies[user]
        response = handler(request)
        if "pinning" in response.cookies:
            cookies[user] = response.cookies["pinning"].value


def resident() -> float:
    """Return the resident memory of the process (MB)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    cookies: dict[int, str] = {}
    run(WARM_UP, cookies)
    before = resident()
    run(REQUESTS, cookies)
    print(
        f"{before:.1f} MB after {WARM_UP:,} requests, "
        f"{resident():.1f} MB after {REQUESTS:,} more of {len(cookies):,} users"
    )


if __name__ == "__main__":
    main()
