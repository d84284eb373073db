"""
Django REST framework: users who are known only inside the view, by its authentication classes.

Stores that want the user (``CacheStore``) are asked when every middleware has run, and by then
nobody has looked at an API client's credentials. Wrap the class that does::

    REST_FRAMEWORK = {"DEFAULT_AUTHENTICATION_CLASSES": ["shop.authentication.Token"]}

    # shop/authentication.py
    from pinning_middleware.contrib.rest_framework import pinned
    Token = pinned(rest_framework.authentication.TokenAuthentication)

The pins are loaded the moment that it has found the user; they are saved as ever.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pinning_middleware.conf import conf
from pinning_middleware.scopes.scope import entered_scope
from pinning_middleware.stores.base import log_store_error

__all__ = ["load_pins", "pinned"]


T = TypeVar("T", bound=type[Any])


def pinned(authentication: T) -> T:
    """Return this authentication class, as one that loads the pins of whoever it finds."""

    class Pinned(authentication):  # type: ignore[valid-type, misc]
        def authenticate(self, request: Any) -> Any:
            found = super().authenticate(request)
            if found is not None:
                load_pins(request, found[0])
            return found

    Pinned.__name__ = Pinned.__qualname__ = authentication.__name__
    Pinned.__doc__ = authentication.__doc__
    return Pinned  # type: ignore[return-value]


def load_pins(request: Any, user: Any) -> None:
    """Take up the pins of a user who has just become known, for the rest of this request."""
    # What Django REST framework does itself a moment later.
    plain = getattr(request, "_request", request)
    plain.user = user
    scope = entered_scope()
    if scope is None or not conf.enabled:
        return
    for store in conf.stores_at_view:
        try:
            scope.carry(store.load(plain))
        except Exception as error:
            log_store_error(store, "load", error)
