"""Which transactions are open on a connection of Django."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

# Of libpq: ACTIVE, INTRANS and INERROR.
# https://www.postgresql.org/docs/current/libpq-status.html#LIBPQ-PQTRANSACTIONSTATUS
_OPEN = (1, 2, 3)


def is_transaction_open(connection: BaseDatabaseWrapper) -> bool:
    """Return whether a transaction other than that of a TestCase is open."""
    return count_open_transactions(connection) > 0


def count_open_transactions(connection: BaseDatabaseWrapper) -> int:
    """Return the number of transactions and savepoints that are open, without those of TestCase."""
    if connection.connection is None:
        return 0
    if connection.in_atomic_block:
        blocks = connection.atomic_blocks
        return sum(not block._from_testcase for block in blocks)  # type: ignore[attr-defined]
    return not connection.autocommit or getattr(connection, "in_raw_transaction", False)


def driver_in_transaction(connection: BaseDatabaseWrapper) -> bool | None:
    """Return whether the driver knows a transaction to be open; None if unknown."""
    raw = connection.connection
    if raw is None:
        return False
    if connection.vendor == "postgresql":
        return raw.info.transaction_status in _OPEN
    known: bool | None = getattr(raw, "in_transaction", None)
    return known
