"""
Reads that every standby refuses for being one, so that they go to the primary at once.

A standby cannot read an unlogged table, call a function that writes, or run in the isolation level
``serializable``. The first read finds out by its error, and is retried on the primary.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache
from typing import Any, Final, NamedTuple

from pinning_middleware.servers.dialects import Refusal

# Seconds after which the statement is tried on a standby again: the table or the role may have
# been changed.
REMEMBERED_FOR: Final = 60.0
# Maximum number of statements that are remembered.
MAX_STATEMENTS: Final = 256
# Maximum number of characters of a statement that are logged and counted.
NAME_LENGTH: Final = 80


class KnownRefusal(NamedTuple):
    """
    What is known of a statement. ``name``: the role, the tables, or the statement. ``until``: when
    it is forgotten (monotonic clock).
    """

    name: str
    is_write: bool = False
    until: float = 0.0


class Refusals:
    """What the standbys of one pool refuse: every read, some tables, some statements."""

    def __init__(self) -> None:
        # Whether nothing was ever refused.
        self.is_empty = True
        self._all_reads: KnownRefusal | None = None
        self._tables: dict[str, KnownRefusal] = {}
        self._statements: dict[str, KnownRefusal] = {}

    @property
    def include_all_reads(self) -> bool:
        """Whether the standbys refuse every read of the site's role."""
        return self._all_reads is not None and self._all_reads.until > time.monotonic()

    def includes_model(self, model: Any) -> bool:
        """Return whether no standby can read the table of a model."""
        if not self._tables:
            return False
        known = self._tables.get(str(getattr(getattr(model, "_meta", None), "db_table", "")))
        return known is not None and known.until > time.monotonic()

    def add(self, refusal: Refusal, sql: str, role: str) -> KnownRefusal:
        """Remember what a standby refused."""
        self.is_empty = False
        until = time.monotonic() + REMEMBERED_FOR
        if refusal.all_reads:
            self._all_reads = KnownRefusal(f"role {role}", False, until)
            return self._all_reads
        tables = [name for name in refusal.tables if _word(name).search(sql)]
        name = ", ".join(tables) or " ".join(sql.split())[:NAME_LENGTH]
        known = KnownRefusal(name, refusal.is_write, until)
        if tables:
            self._tables.update({name: known._replace(name=name) for name in tables})
        elif refusal.is_lasting:
            # A function that writes; a view or a function that reads such a table.
            self._statements[sql] = known
            if len(self._statements) > MAX_STATEMENTS:
                # Copy, because other threads may add statements.
                oldest, *_ = tuple(self._statements)
                self._statements.pop(oldest, None)
        return known

    def find(self, sql: str) -> KnownRefusal | None:
        """Return what is known of a statement, or None."""
        tables = [known for name, known in tuple(self._tables.items()) if _word(name).search(sql)]
        found = (self._all_reads, self._statements.get(sql), *tables)
        now = time.monotonic()
        return next((known for known in found if known is not None and known.until > now), None)


@lru_cache
def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w$]){re.escape(name)}(?![\w$])")
