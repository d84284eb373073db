"""Stores, which keep pins between scopes."""

from __future__ import annotations

from pinning_middleware.stores.base import BaseStore
from pinning_middleware.stores.cache import CacheStore
from pinning_middleware.stores.token_stores import CookieStore, HeaderStore, TokenStore
from pinning_middleware.stores.user_key import auser_key, user_key

__all__ = [
    "BaseStore",
    "CacheStore",
    "CookieStore",
    "HeaderStore",
    "TokenStore",
    "auser_key",
    "user_key",
]
