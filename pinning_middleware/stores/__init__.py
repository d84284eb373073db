"""Where pins live between scopes."""

from __future__ import annotations

from .base import BaseStore
from .cache import CacheStore, auser_key, user_key
from .client import CookieStore, HeaderStore, TokenStore

__all__ = [
    "BaseStore",
    "CacheStore",
    "CookieStore",
    "HeaderStore",
    "TokenStore",
    "auser_key",
    "user_key",
]
