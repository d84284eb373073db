"""Adds the panel to every page."""

from __future__ import annotations

from collections.abc import Callable

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.template.loader import render_to_string

from pinning_middleware import use_replica
from pinning_middleware.conf import conf

from .pins import pin_status
from .recording import Kept, Recording

PLACE = b"<!-- panel -->"
OFF_COOKIE = "sample_pinning_off"
BEFORE_COOKIE = "sample_before"


class PanelMiddleware:
    """Record the databases of a page's reads, and show them on the page.

    It is placed directly after the pinning middleware, so that it records reads of the session and
    can read the pin.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response
        self.kept = Kept()

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Record the statements, and add the panel to pages that have a place for it."""
        recording = Recording(request.method or "", request.path)
        request.recording = recording  # type: ignore[attr-defined]
        with recording.watch_all():
            response = self._answer(request)
        if PLACE in getattr(response, "content", b""):
            self._add_panel(request, response, recording)
        elif 300 <= response.status_code < 400 and recording.queries:
            key = self.kept.put(recording)
            response.set_cookie(BEFORE_COOKIE, key, max_age=30, httponly=True, samesite="Lax")
        return response

    def _answer(self, request: HttpRequest) -> HttpResponse:
        if not is_switched_off(request):
            return self.get_response(request)
        with use_replica():
            return self.get_response(request)

    def _add_panel(
        self, request: HttpRequest, response: HttpResponse, recording: Recording
    ) -> None:
        before = self.kept.take(request.COOKIES.get(BEFORE_COOKIE, ""))
        if before is not None:
            response.delete_cookie(BEFORE_COOKIE, samesite="Lax")
        context = {
            "recording": recording,
            "before": before,
            "pin": pin_status(recording, is_switched_off(request)),
            "window": round(conf.seconds),
            "positions": conf.positions,
            "replicas": settings.PINNING_REPLICAS,
            "off_cookie": OFF_COOKIE,
            "site": f"{request.scheme}://{request.get_host()}",
        }
        panel = render_to_string("panel/panel.html", context)
        response.content = response.content.replace(PLACE, panel.encode(), 1)
        if "Content-Length" in response:
            response["Content-Length"] = str(len(response.content))


def is_switched_off(request: HttpRequest) -> bool:
    """Whether pinning is switched off in this browser."""
    return request.COOKIES.get(OFF_COOKIE) == "1"
