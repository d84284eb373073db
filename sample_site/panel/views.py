"""What the panel's script asks for."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
from django.conf import settings
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST, require_safe

from . import replication

# Another site's page can't send a header of our own, which is what a CSRF token would be for.
OWN_HEADER = "Sample-Panel"


@never_cache
@require_safe
def status(request: HttpRequest) -> HttpResponse:
    """How far the replicas are. It touches neither session nor pin."""
    return answer()


@csrf_exempt
@require_POST
def pause(request: HttpRequest, alias: str) -> HttpResponse:
    """Stop a replica's replay."""
    return control(request, alias, replication.pause)


@csrf_exempt
@require_POST
def resume(request: HttpRequest, alias: str) -> HttpResponse:
    """Let it replay again."""
    return control(request, alias, replication.resume)


@csrf_exempt
@require_POST
def delay(request: HttpRequest, alias: str) -> HttpResponse:
    """Set how late commits take effect on a replica."""
    try:
        seconds = float(request.POST.get("seconds", ""))
    except ValueError:
        return answer("`seconds` must be a number", 400)
    return control(request, alias, lambda alias: replication.set_delay(alias, seconds))


def control(request: HttpRequest, alias: str, action: Callable[[str], None]) -> HttpResponse:
    """Do something to a replica; a refusal by the server is told, not raised."""
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
    """Return where the replicas are now, and what went wrong."""
    replicas = [replica.as_json() for replica in replication.status()]
    return JsonResponse({"replicas": replicas, "error": error}, status=status)
