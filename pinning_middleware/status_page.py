"""
A status page for staff: servers, replication lag, reads by server and reason, and recent events.

It shows the state held by this process; a view queries no server. While the page is open, monitors
measure the lag of the replicas that this process reads. Its script polls with a signed token
from the page instead of the user's cookies, so an open page reads no session and extends no pin.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any, Final

from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import PermissionDenied
from django.core.signing import BadSignature, TimestampSigner
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.template.loader import render_to_string
from django.urls import NoReverseMatch, reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from pinning_middleware import dry_run_report, stats
from pinning_middleware.api import use_primary
from pinning_middleware.conf import conf
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.routing.pools import pools
from pinning_middleware.stats import (
    DRAINED,
    HEALTH_NAMES,
    OK,
    ServerState,
    format_duration,
    format_size,
)
from pinning_middleware.utils import counters

# Lifetime of the page's polling token (seconds), and the header that contains it.
TOKEN_AGE: Final = 3600
TOKEN_HEADER: Final = "Pinning-Status"
SHOWN_EVENTS: Final = 20
# Text of an empty cell.
NONE: Final = "-"

EVENTS: Final = {
    "fell_back_to_primary": "Fell back to the primary",
    "fell_back_to_replica": "Fell back to a replica",
    "read_retried": "Read retried on another server",
    "replica_removed": "Replica removed from rotation",
    "replica_restored": "Replica restored to rotation",
}


# Access


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


def _login_redirect(request: HttpRequest) -> HttpResponseBase | None:
    """
    Return a redirect to the login page, or None if the user is a member of staff.

    Like ``staff_member_required``, but it also works without the admin. Raise PermissionDenied if
    the user is logged in and the site has no admin.
    """
    user = getattr(request, "user", None)
    # The page is most useful while replicas are unresponsive, so do not read the user from one.
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


# Views


@login_not_required
@never_cache
@require_safe
def page(request: HttpRequest) -> HttpResponseBase:
    """Render the page, which reloads itself if JavaScript is off."""
    if (redirect := _login_redirect(request)) is not None:
        return redirect
    context = {
        **_state(),
        "columns": COLUMNS,
        "event_columns": EVENT_COLUMNS,
        "token": _token(),
        "url": reverse("pinning_middleware:status-data"),
    }
    # Render without the request, because context processors may query a database.
    return HttpResponse(render_to_string("pinning_middleware/status.html", context))


@login_not_required
@never_cache
@require_safe
def data(request: HttpRequest) -> HttpResponseBase:
    """
    Return the state as JSON, for the page's script and for staff. With the page's token, no session
    and no user are loaded.
    """
    if TOKEN_HEADER in request.headers:
        if not _has_token(request):
            return JsonResponse({"error": "expired"}, status=403)
    elif (redirect := _login_redirect(request)) is not None:
        return redirect
    return JsonResponse(_state())


# Content

COLUMNS: Final = (
    "Server",
    "Role",
    "State",
    "Weight",
    "Reads",
    "Position",
    "Behind",
    "Lag",
    "Probed",
)
EVENT_COLUMNS: Final = ("Time (UTC)", "Event", "Alias", "Served by", "Reason")


def _state() -> dict[str, Any]:
    rows = stats.servers()
    read = {row.pool for row in rows if row.reads}
    for pool in pools().all:
        if pool.primary in read:
            pool.sample_lag()
    return {
        "pid": os.getpid(),
        "time": time.time(),
        "summary": _summary(rows),
        "servers": [_server(row) for row in rows],
        "by_server": _by_server(rows),
        "by_reason": _by_reason(),
        "dry_run": " ".join(
            text for run in dry_run_report.of_this_process() for text in run.summary
        ),
        # Other threads may add events meanwhile.
        "events": [_event(event) for event in tuple(stats.recent_events)[: -SHOWN_EVENTS - 1 : -1]],
    }


def _summary(rows: list[ServerState]) -> dict[str, str]:
    if not conf.enabled:
        return {
            "state": "degraded",
            "text": "PINNING_ENABLED is False: every read goes to the primary.",
        }
    # A server that was not probed yet is in rotation.
    assumed = [row._replace(state="in") if row.state == "unknown" else row for row in rows]
    worst = stats.health(assumed) if rows else OK
    sentences = []
    for pool in dict.fromkeys(row.pool for row in rows):
        aliases = {row.alias for row in rows if row.pool == pool and row.configured == "replica"}
        usable = {row.alias for row in rows if row.alias in aliases and row.state != "out"}
        sentences.append(f"{pool}: {len(usable)} of {len(aliases)} replicas are in rotation.")
    sentences += [
        f"{row.alias}: {_description(row.reason)}."
        for row in rows
        if row.state == "out" and row.reason != DRAINED
    ]
    return {
        "state": HEALTH_NAMES[worst],
        "text": " ".join(sentences) or "PINNING_REPLICAS is empty.",
    }


def _server(row: ServerState) -> dict[str, Any]:
    """Return the fields of a row, and the texts of its table cells under ``cells``."""
    state = "Not probed yet" if row.state == "unknown" else row.state.capitalize()
    if row.reason:
        state = f"Out: {_description(row.reason)}"
    if row.since is not None:
        state += f", for {format_duration(time.time() - row.since)}"
    if row.retry_in is not None:
        state += f", retried in {format_duration(row.retry_in)}"
    role = row.role or row.configured
    return {
        **row._asdict(),
        "is_drained": row.reason == DRAINED,
        "cells": _cells(
            COLUMNS[1:],
            role if role == row.configured else f"{role}, configured as {row.configured}",
            f"{state}. {row.error}" if row.error else state,
            row.share or NONE,
            str(row.reads),
            row.position or NONE,
            NONE if row.behind_bytes is None else format_size(row.behind_bytes),
            NONE if row.lag is None else format_duration(row.lag),
            NONE if row.age is None else f"{format_duration(row.age)} ago",
        ),
    }


def _cells(labels: tuple[str, ...], *texts: str) -> list[dict[str, str]]:
    pairs = zip(labels, texts, strict=True)
    return [{"label": label, "text": text} for label, text in pairs]


def _by_server(rows: list[ServerState]) -> list[dict[str, Any]]:
    return _shares([(row.alias, row.address, row.reads) for row in rows])


def _by_reason() -> list[dict[str, Any]]:
    found: Counter[str] = Counter()
    # Copy, because other threads count during the iteration.
    for (*_, reason), number in dict(counters.reads).items():
        found[reason] += number
    return _shares([(name, _description(name), number) for name, number in found.most_common()])


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
    """Return the text for a fault or a reason; an error is its own text."""
    if reason == DRAINED:
        return "its weight is 0"
    for kind in (Fault, Reason):
        if reason in set(kind):
            return kind(reason).description
    return reason


def _event(event: stats.Event) -> dict[str, Any]:
    at = datetime.fromtimestamp(event.at, UTC)
    title = EVENTS.get(event.kind, event.kind)
    return {
        **event._asdict(),
        "iso": at.isoformat(timespec="seconds"),
        "cells": _cells(
            EVENT_COLUMNS,
            f"{at:%H:%M:%S}",
            title if event.times == 1 else f"{title}, {event.times} times",
            event.alias or event.pool,
            event.served or NONE,
            _description(event.reason) or NONE,
        ),
    }
