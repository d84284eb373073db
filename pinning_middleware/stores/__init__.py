"""Where pins live between scopes."""

from __future__ import annotations

from pinning_middleware.stores.base import BaseStore
from pinning_middleware.stores.cache import CacheStore, auser_key, user_key
from pinning_middleware.stores.client import CookieStore, HeaderStore, TokenStore

__all__ = [
    "BaseStore",
    "CacheStore",
    "CookieStore",
    "HeaderStore",
    "TokenStore",
    "auser_key",
    "user_key",
]
