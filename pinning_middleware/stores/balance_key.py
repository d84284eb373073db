"""PINNING_BALANCE_BY = "user": the key by which the user of a request stays on one replica."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from asgiref.sync import async_to_sync, iscoroutinefunction
from django.contrib.auth import SESSION_KEY

from pinning_middleware.conf import conf
from pinning_middleware.stores.user_key import access_unrecorded, evaluated_user, user_key
from pinning_middleware.utils.logging import log_rate_limited

if TYPE_CHECKING:
    from django.http import HttpRequest

logger = logging.getLogger("pinning_middleware")


class BalanceKey:
    """
    Callable: returns PINNING_USER_KEY of a request, or else the raw value of its session's cookie,
    or else None.

    It loads neither a session nor a user. Until something else does, the user is unknown.
    """

    def __init__(self, request: HttpRequest) -> None:
        self._request = request
        self._user: str | None = None
        self._is_evaluating = False

    def __call__(self) -> str | None:
        if self._user is None and not self._is_evaluating:
            # What the function itself reads must not call it again.
            self._is_evaluating = True
            try:
                self._user = _known_user(self._request)
            except Exception as error:  # the function is the site's own
                log_rate_limited(
                    logger,
                    logging.WARNING,
                    ("balance key",),
                    "PINNING_USER_KEY failed; the request's reads are balanced without it: %s",
                    error,
                )
            finally:
                self._is_evaluating = False
        if self._user is not None:
            return f"user:{self._user}"
        cookie = self._request.COOKIES.get(conf.session_cookie_name)
        return f"session:{cookie}" if cookie else None


def _known_user(request: HttpRequest) -> str | None:
    """Return PINNING_USER_KEY if that loads nothing, or None."""
    known: str | None = request.__dict__.get("_pinning_key")
    if known is not None:
        # CacheStore has evaluated it.
        return known
    user, session = evaluated_user(request), getattr(request, "session", None)
    function: Any = conf.key
    if function is user_key and user is not None:
        return user
    if user is None and session is not None and not _is_loaded(session):
        return None
    if function is not user_key and user is None and _is_logged_in(session):
        # It would load the user.
        return None
    if iscoroutinefunction(function):
        function = async_to_sync(function)
    with access_unrecorded(session):
        key = function(request)
    return None if key is None else str(key)


def _is_loaded(session: Any) -> bool:
    """Return whether the session's data are known; those of a new session are."""
    is_new = getattr(session, "session_key", "") is None
    return is_new or "_session_cache" in getattr(session, "__dict__", ())


def _is_logged_in(session: Any) -> bool:
    if session is None:
        return False
    with access_unrecorded(session):
        return session.get(SESSION_KEY) is not None
