"""Views for the panel's script."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
from django.conf import settings
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST, require_safe

from . import replication

# Pages of other sites cannot send this custom header, so it replaces a CSRF token.
OWN_HEADER = "Sample-Panel"


@never_cache
@require_safe
def status(request: HttpRequest) -> HttpResponse:
    """Return the state of the replicas, without using the session or a pin."""
    return answer()


@csrf_exempt
@require_POST
def pause(request: HttpRequest, alias: str) -> HttpResponse:
    """Pause a replica's replay."""
    return control(request, alias, replication.pause)


@csrf_exempt
@require_POST
def resume(request: HttpRequest, alias: str) -> HttpResponse:
    """Resume a replica's replay."""
    return control(request, alias, replication.resume)


@csrf_exempt
@require_POST
def delay(request: HttpRequest, alias: str) -> HttpResponse:
    """Set the replay delay of a replica."""
    try:
        seconds = float(request.POST.get("seconds", ""))
    except ValueError:
        return answer("`seconds` must be a number", 400)
    return control(request, alias, lambda alias: replication.set_delay(alias, seconds))


def control(request: HttpRequest, alias: str, action: Callable[[str], None]) -> HttpResponse:
    """Run an action on a replica; return errors of the server in the response."""
    if alias not in settings.PINNING_REPLICAS:
        raise Http404
    if OWN_HEADER not in request.headers:
        return answer(f"the header {OWN_HEADER} is missing", 403)
    try:
        action(alias)
    except psycopg.errors.InsufficientPrivilege:
        return answer(replication.NOT_ALLOWED, 403)
    except psycopg.Error as error:
        return answer(f"{alias}: {error}".strip(), 502)
    return answer()


def answer(error: str | None = None, status: int = 200) -> HttpResponse:
    """Return the state of the replicas, and an error, if any."""
    replicas = [replica.as_json() for replica in replication.status()]
    return JsonResponse({"replicas": replicas, "error": error}, status=status)
