"""The tools of this package as methods of a test case."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from pinning_middleware.testing.clock import reset_step
from pinning_middleware.testing.reads import Read, assert_num_reads, assert_reads_from
from pinning_middleware.testing.replicas import replicas

__all__ = ["PinningAssertions"]


class PinningAssertions:
    """
    A mixin of ``SimpleTestCase`` and its descendants. When a test is over no replica lags any more,
    and windows end as they did before::

        class TestComments(PinningAssertions, TestCase):
            databases = "__all__"

            def test_list(self):
                with self.assertReadsFrom("replica"):
                    self.client.get("/comments/")
    """

    def run(self, result: Any = None) -> Any:
        try:
            return super().run(result)  # type: ignore[misc]
        finally:
            replicas.reset()
            reset_step()

    def assertReadsFrom(
        self, where: str, reason: str | None = None
    ) -> AbstractContextManager[list[Read]]:
        """
        Assert that there are reads inside the block and that each goes to ``"replica"``,
        ``"primary"`` or this alias, for this reason where one is given.
        """
        return assert_reads_from(where, reason)

    def assertNumReads(
        self, primary: int | None = None, replica: int | None = None
    ) -> AbstractContextManager[list[Read]]:
        """Assert how many reads inside the block are for which role; ``None``: any number."""
        return assert_num_reads(primary, replica)
