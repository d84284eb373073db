"""The board as JSON, for scripts without cookies that send the header `Pinning-Token`:

curl -i -u ada:ada -d text=Hello http://127.0.0.1:8000/api/messages/
curl -H "Pinning-Token: …" http://127.0.0.1:8000/api/messages/
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from django.contrib.auth import authenticate
from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_http_methods, require_safe

from pinning_middleware import is_pinned
from sample_site.panel.recording import recorded

from .forms import MessageForm
from .models import Message

SHOWN = 30


# CSRF tokens are not needed: writes require a name and a password, and ignore cookies.
@csrf_exempt
@require_http_methods(["GET", "HEAD", "POST"])
def messages(request: HttpRequest) -> HttpResponse:
    """List the newest messages, or add one."""
    return add(request) if request.method == "POST" else newest(request)


def newest(request: HttpRequest) -> HttpResponse:
    """Return the newest messages."""
    rows = [as_json(row) for row in Message.objects.select_related("author")[:SHOWN]]
    return JsonResponse({"messages": rows} | routing(request))


def add(request: HttpRequest) -> HttpResponse:
    """Add a message of the user whose name and password come with the request."""
    user = user_of(request)
    if user is None:
        headers = {"WWW-Authenticate": 'Basic realm="sample"'}
        return JsonResponse({"error": "wrong name or password"}, status=401, headers=headers)
    # The cache stores pins by user, so the user's browsers see the message, too.
    request.user = user
    form = MessageForm(request.POST)
    form.instance.author = user
    if not form.is_valid():
        return JsonResponse({"error": form.errors}, status=400)
    return JsonResponse(as_json(form.save()) | routing(request), status=201)


@require_safe
def whoami(request: HttpRequest) -> HttpResponse:
    """Return the user of a client, and how its reads are routed."""
    user = user_of(request) or request.user
    return JsonResponse({"user": user.get_username() or None} | routing(request))


def user_of(request: HttpRequest) -> User | None:
    """Return the user named in the Authorization header."""
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, _, password = base64.b64decode(credentials).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    user = authenticate(request, username=name, password=password)
    return user if isinstance(user, User) else None


def routing(request: HttpRequest) -> dict[str, Any]:
    """Return the databases of this request's reads."""
    return {"pinned": is_pinned(), "read_from": recorded(request).read_from}


def as_json(message: Message) -> dict[str, Any]:
    """Return a message as JSON data."""
    return {
        "id": message.pk,
        "author": message.author.get_username(),
        "text": message.text,
        "created": message.created.isoformat(),
    }
