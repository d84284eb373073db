"""
The time that one read may spend on connecting, probing and retrying, in this thread.

The execution of a statement on a server that answers probes does not count, however long it takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from django.db import OperationalError

# Seconds. After that only the primary is tried, or the last replica if the primary cannot serve the
# read, so that a read waits no longer than 1.5 s.
READ_BUDGET: Final = 1.4

# Seconds without spending after which a thread that only connects gets a new budget.
RENEWED_AFTER: Final = 1.0


class BudgetExhausted(OperationalError):
    """
    A read's budget ended before a server had the usual time to answer, which is no evidence against
    the server.
    """


class _ReadBudget(threading.local):
    _spent = 0.0
    # Monotonic time at which some of it was spent last.
    _spent_at = 0.0
    _is_spending = False

    @property
    def left(self) -> float:
        """Seconds that are left."""
        if not self._is_spending and time.monotonic() - self._spent_at > RENEWED_AFTER:
            self.renew()
        return max(READ_BUDGET - self._spent, 0.0)

    def spend(self, seconds: float) -> None:
        """
        Subtract what a read has waited for a server that did not answer. Inside ``spending()`` it
        is subtracted anyway.
        """
        if not self._is_spending:
            self._add(seconds)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Subtract the time that the block takes; blocks may be nested."""
        if self._is_spending:
            yield
            return
        began, self._is_spending = time.monotonic(), True
        try:
            yield
        finally:
            self._is_spending = False
            self._add(time.monotonic() - began)

    def renew(self) -> None:
        """Begin again for the thread's next statement."""
        self._spent = 0.0

    def _add(self, seconds: float) -> None:
        if self._spent < READ_BUDGET:
            self._spent, self._spent_at = self._spent + seconds, time.monotonic()


read_budget = _ReadBudget()
