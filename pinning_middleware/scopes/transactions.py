"""Whether the code itself has opened the transaction of a connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pinning_middleware.utils.transactions import count_open_transactions

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from pinning_middleware.scopes.scope import Scope

# Functions that return whether a transaction is open on an alias, on connections that are not
# Django's.
elsewhere: list[Callable[[str], bool]] = []


def is_explicit_transaction_open(connection: BaseDatabaseWrapper, scope: Scope) -> bool:
    """
    Return whether the code has opened a transaction. The one that ATOMIC_REQUESTS opens around a
    view does not count.
    """
    if elsewhere and any(is_open(connection.alias) for is_open in elsewhere):
        return True
    opened = count_open_transactions(connection)
    if opened == 0:
        return False
    is_view_transaction = scope.view_transactions.get(connection.alias) is connection
    return opened > is_view_transaction
