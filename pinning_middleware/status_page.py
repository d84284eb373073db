"""
A page for staff: which database answers, how far replicas are, and what went wrong lately.

It shows what this process knows and asks no server. Its script polls without the user's cookies,
by a token that the page holds: so a page that stays open reads no session and adds to no pin.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Any, Final

from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import PermissionDenied
from django.core.signing import BadSignature, TimestampSigner
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.template.loader import render_to_string
from django.urls import NoReverseMatch, reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from pinning_middleware import stats
from pinning_middleware.api import use_primary
from pinning_middleware.conf import conf
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.stats import DEGRADED, DOWN, DRAINED, ServerState, in_bytes, in_seconds

__all__ = ["data", "page"]

# Seconds for which a page may poll before its user is asked for again; the header it does so by.
TOKEN_AGE: Final = 3600
TOKEN_HEADER: Final = "Pinning-Status"
SHOWN_EVENTS: Final = 20
# Where there is nothing to say.
NONE: Final = "-"

FAULTS: Final = {
    Fault.UNREACHABLE: "cannot be connected to",
    Fault.UNRESPONSIVE: "does not answer",
    Fault.PROMOTED: "takes writes of its own",
    Fault.STALE_RESTART: "has less than before its restart",
    Fault.LAG: "lags too far",
    DRAINED: "drained: its weight is 0",
}
EVENTS: Final = {
    "fell_back_to_primary": "Fell back to the primary",
    "fell_back_to_replica": "Fell back to a replica",
    "read_retried": "Read again elsewhere",
    "replica_removed": "Left out",
    "replica_restored": "Taken back",
}

View = Callable[[HttpRequest], HttpResponseBase]


# Who may look


def _token() -> str:
    return _signer().sign("status")


def _signer() -> TimestampSigner:
    return TimestampSigner(salt="pinning_middleware.status_page")


def _has_token(request: HttpRequest) -> bool:
    try:
        _signer().unsign(request.headers.get(TOKEN_HEADER, ""), max_age=TOKEN_AGE)
    except BadSignature:
        return False
    return True


def _refusal(request: HttpRequest) -> HttpResponseBase | None:
    """
    Return where somebody who is no member of staff is sent, ``None`` for one who is. As
    ``staff_member_required`` does it, on a site without the admin too.
    """
    user = getattr(request, "user", None)
    # Not from a replica: that they hang may be why somebody looks.
    with use_primary():
        if user is not None and user.is_active and user.is_staff:
            return None
    from django.contrib.auth.views import redirect_to_login

    try:
        login_url = reverse("admin:login")
    except NoReverseMatch:
        if user is None or user.is_authenticated:
            raise PermissionDenied from None
        login_url = None
    return redirect_to_login(request.get_full_path(), login_url)


def _for_staff(view: View) -> View:
    @wraps(view)
    def guarded(request: HttpRequest) -> HttpResponseBase:
        return _refusal(request) or view(request)

    guarded_view: View = login_not_required(never_cache(require_safe(guarded)))
    return guarded_view


# The two views


@_for_staff
def page(request: HttpRequest) -> HttpResponseBase:
    """The page, complete: without a script it loads itself again."""
    context = {
        **_facts(),
        "columns": COLUMNS,
        "event_columns": EVENT_COLUMNS,
        "token": _token(),
        "url": reverse("pinning_middleware:status-data"),
    }
    # Without the request: a context processor may ask whom it likes.
    return HttpResponse(render_to_string("pinning_middleware/status.html", context))


def _data(request: HttpRequest) -> HttpResponseBase:
    """What changes of the page, as JSON: for its script, and for staff."""
    if TOKEN_HEADER in request.headers and not _has_token(request):
        return JsonResponse({"error": "expired"}, status=403)
    return JsonResponse(_facts())


_data_for_staff = _for_staff(_data)


@login_not_required
@never_cache
@require_safe
def data(request: HttpRequest) -> HttpResponseBase:
    """What changes of the page: with the page's token, no session and no user is looked up."""
    return (_data if TOKEN_HEADER in request.headers else _data_for_staff)(request)


# What they show

COLUMNS: Final = (
    "Server",
    "Role",
    "State",
    "Weight",
    "Reads",
    "Position",
    "Behind",
    "Lag",
    "Asked",
)
EVENT_COLUMNS: Final = ("Time (UTC)", "What", "Whom", "Served by", "Why")


def _facts() -> dict[str, Any]:
    rows = stats.servers()
    return {
        "pid": os.getpid(),
        "time": time.time(),
        "summary": _summary(rows),
        "servers": [_server(row) for row in rows],
        "by_server": _by_server(rows),
        "by_reason": _by_reason(),
        "events": [_event(event) for event in reversed(stats.recent)][:SHOWN_EVENTS],
    }


def _summary(rows: list[ServerState]) -> dict[str, str]:
    if not conf.enabled:
        return {
            "state": "degraded",
            "text": "PINNING_ENABLED is off: no replica is read.",
        }
    met = [row for row in rows if row.state != "unknown"]
    worst = stats.verdict(met) if any(row.configured == "replica" for row in met) else 0
    said = []
    for pool in dict.fromkeys(row.pool for row in rows):
        aliases = {row.alias for row in rows if row.pool == pool and row.configured == "replica"}
        serving = {row.alias for row in rows if row.alias in aliases and row.state != "out"}
        said.append(f"{pool}: {len(serving)} of {len(aliases)} replicas serve.")
    said += [
        f"{row.alias} {FAULTS.get(row.reason, row.reason)}."
        for row in rows
        if row.state == "out" and row.reason != DRAINED
    ]
    words = {DEGRADED: "degraded", DOWN: "down"}
    return {
        "state": words.get(worst, "well"),
        "text": " ".join(said) or "PINNING_REPLICAS names no replica.",
    }


def _server(row: ServerState) -> dict[str, Any]:
    """Return a row's values, and under ``cells`` what the page says of each column."""
    state = "Not met yet" if row.state == "unknown" else row.state.capitalize()
    if row.reason:
        state = f"Out: {FAULTS.get(row.reason, row.reason)}"
    if row.since is not None:
        state += f", for {in_seconds(time.time() - row.since)}"
    if row.retry_in is not None:
        state += f", tried again in {in_seconds(row.retry_in)}"
    role = row.role or row.configured
    return {
        **row._asdict(),
        "is_drained": row.reason == DRAINED,
        "cells": _cells(
            COLUMNS[1:],
            role if role == row.configured else f"{role}, configured as {row.configured}",
            f"{state}. {row.error}" if row.error else state,
            NONE if row.weight is None else str(row.weight),
            str(row.reads),
            row.position or NONE,
            NONE if row.behind_bytes is None else in_bytes(row.behind_bytes),
            NONE if row.lag is None else in_seconds(row.lag),
            NONE if row.age is None else f"{in_seconds(row.age)} ago",
        ),
    }


def _cells(labels: tuple[str, ...], *texts: str) -> list[dict[str, str]]:
    pairs = zip(labels, texts, strict=True)
    return [{"label": label, "text": text} for label, text in pairs]


def _by_server(rows: list[ServerState]) -> list[dict[str, Any]]:
    return _shares([(row.alias, row.address, row.reads) for row in rows])


def _by_reason() -> list[dict[str, Any]]:
    found = dict.fromkeys(map(str, Reason), 0)
    for by_alias in stats.get_stats()["reads"].values():
        for by_server in by_alias.values():
            for by_reason in by_server.values():
                for reason, number in by_reason.items():
                    found[reason] = found.get(reason, 0) + number
    most_first = sorted(found.items(), key=lambda each: -each[1])
    return _shares(
        [(name, Reason(name).description, number) for name, number in most_first if number]
    )


def _shares(reads: list[tuple[str, str, int]]) -> list[dict[str, Any]]:
    total = sum(number for _, _, number in reads)
    return [
        {
            "name": name,
            "text": text,
            "reads": number,
            "percent": round(100 * number / total, 1) if total else 0.0,
        }
        for name, text, number in reads
    ]


def _description(reason: str) -> str:
    return Reason(reason).description if reason in set(Reason) else reason


def _event(event: stats.Event) -> dict[str, Any]:
    at = datetime.fromtimestamp(event.at, UTC)
    what = EVENTS.get(event.kind, event.kind)
    why = FAULTS.get(event.reason) or _description(event.reason)
    return {
        **event._asdict(),
        "iso": at.isoformat(timespec="seconds"),
        "cells": _cells(
            EVENT_COLUMNS,
            f"{at:%H:%M:%S}",
            what if event.times == 1 else f"{what}, {event.times} times",
            event.alias or event.pool,
            event.served or NONE,
            why or NONE,
        ),
    }
