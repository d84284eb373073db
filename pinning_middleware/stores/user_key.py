"""The default of PINNING_USER_KEY: the ID of the logged-in user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.contrib.auth import SESSION_KEY
from django.utils.functional import empty

if TYPE_CHECKING:
    from django.http import HttpRequest


def user_key(request: HttpRequest) -> str | None:
    """
    Return the ID of the logged-in user, or None for an anonymous user.

    The session contains the ID, so the user is not read from the database. A request without a
    session loads nothing. A session engine need not be derived from Django's.
    """
    if (user := evaluated_user(request)) is not None or not _has_session(request):
        return user
    with access_unrecorded(request.session) as session:
        return _text(session.get(SESSION_KEY))


async def auser_key(request: HttpRequest) -> str | None:
    """Return `user_key(request)`, in async code."""
    if (user := evaluated_user(request)) is not None or not _has_session(request):
        return user
    with access_unrecorded(request.session) as session:
        if hasattr(session, "aget"):
            return _text(await session.aget(SESSION_KEY))
        return _text(await sync_to_async(session.get)(SESSION_KEY))


def _text(user_id: Any) -> str | None:
    return None if user_id is None else str(user_id)


@contextmanager
def access_unrecorded(session: Any) -> Iterator[Any]:
    """Read the session without making the response vary by the cookie."""
    accessed = getattr(session, "accessed", None)
    try:
        yield session
    finally:
        if accessed is not None:
            session.accessed = accessed


def _has_session(request: HttpRequest) -> bool:
    session = getattr(request, "session", None)
    # Every engine with a cookie has a key; without one the session is new, or not kept at all.
    return session is not None and bool(getattr(session, "session_key", True))


def evaluated_user(request: HttpRequest) -> str | None:
    """Return the ID of the user if `request.user` is known already, for example by a token."""
    user = getattr(request, "user", None)
    # A lazy user that was not evaluated comes from the session.
    if user is None or getattr(user, "_wrapped", None) is empty or not user.is_authenticated:
        return None
    return str(user.pk)
