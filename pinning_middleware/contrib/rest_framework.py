"""
Django REST framework: load pins of users that are authenticated inside the view.

Stores that need the user (``CacheStore``) are loaded after the last middleware. At that time the
authentication classes of the view have not run yet. Wrap the authentication class::

    REST_FRAMEWORK = {"DEFAULT_AUTHENTICATION_CLASSES": ["shop.authentication.Token"]}

    # shop/authentication.py
    from pinning_middleware.contrib.rest_framework import pinned
    Token = pinned(rest_framework.authentication.TokenAuthentication)

The pins are loaded when it has authenticated a user, and saved as usual.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pinning_middleware.conf import conf
from pinning_middleware.scopes.scope import entered_scope
from pinning_middleware.stores import base

__all__ = ["load_pins", "pinned"]


T = TypeVar("T", bound=type[Any])


def pinned(authentication: T) -> T:
    """Return a subclass that also loads the pins of the authenticated user."""

    class Pinned(authentication):  # type: ignore[valid-type, misc]
        def authenticate(self, request: Any) -> Any:
            result = super().authenticate(request)
            if result is not None:
                load_pins(request, result[0])
            return result

    Pinned.__name__ = Pinned.__qualname__ = authentication.__name__
    Pinned.__doc__ = authentication.__doc__
    return Pinned  # type: ignore[return-value]


def load_pins(request: Any, user: Any) -> None:
    """Load the pins of a user for the rest of this request."""
    # Django REST framework sets the user on the request only after this.
    plain = getattr(request, "_request", request)
    plain.user = user
    scope = entered_scope()
    if scope is None or not conf.enabled:
        return
    base.load_pins(conf.stores_at_view, plain, scope.inherit)
