from __future__ import annotations

from typing import Any


class UsersRouter:
    """Accounts live on the primary `users`."""

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return "users" if model._meta.model_name == "account" else None

    db_for_write = db_for_read


class ElsewhereRouter:
    """Tags live on a database that is in no pool."""

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return "elsewhere" if model._meta.model_name == "tag" else None

    db_for_write = db_for_read
