"""
The time that one read may spend on connecting, probing and retrying, in this thread.

The execution of a statement on a server that answers probes does not count, however long it takes.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from django.db import OperationalError

__all__ = ["READ_BUDGET", "BudgetExhausted", "read_budget"]

# Seconds. After that only the primary is tried, so that a read waits no longer than 1.5 s.
READ_BUDGET: Final = 1.4


class BudgetExhausted(OperationalError):
    """
    A read's budget ended before a server had the usual time to answer, which is no evidence against
    the server.
    """


class _ReadBudget(threading.local, AbstractContextManager[None]):
    _spent = _began = 0.0
    _is_spending = False

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(READ_BUDGET - self._spent, 0.0)

    def spend(self, seconds: float) -> None:
        """Subtract what a read has waited for a server that did not answer."""
        self._spent += seconds

    def spending(self) -> AbstractContextManager[None]:
        """Subtract the time that the block takes; blocks may be nested."""
        return nullcontext() if self._is_spending else self

    def __enter__(self) -> None:
        self._is_spending, self._began = True, time.monotonic()

    def __exit__(self, *exc_info: object) -> None:
        self._is_spending = False
        self._spent += time.monotonic() - self._began

    def renew(self) -> None:
        """Begin again for the thread's next read."""
        self._spent = 0.0


read_budget = _ReadBudget()
