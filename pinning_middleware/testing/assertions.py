"""The test utilities as methods of a test case."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from pinning_middleware.testing.clock import reset_window
from pinning_middleware.testing.isolation import isolated_pins
from pinning_middleware.testing.reads import Read, assert_num_reads, assert_reads_from
from pinning_middleware.testing.replicas import replicas


class PinningAssertions:
    """
    A mixin for ``SimpleTestCase`` and its subclasses.

    Each test starts without pins in the cache. After each test, replicas and windows are reset::

        class TestComments(PinningAssertions, TestCase):
            databases = "__all__"

            def test_list(self):
                with self.assertReadsFrom("replica"):
                    self.client.get("/comments/")
    """

    def run(self, result: Any = None) -> Any:
        try:
            with isolated_pins():
                return super().run(result)  # type: ignore[misc]
        finally:
            replicas.reset()
            reset_window()

    def assertReadsFrom(
        self, where: str, reason: str | None = None
    ) -> AbstractContextManager[list[Read]]:
        """
        Assert that there are reads, and that each goes to ``where``, for ``reason`` if given.

        ``where`` is ``"replica"``, ``"primary"`` or an alias.
        """
        return assert_reads_from(where, reason)

    def assertNumReads(
        self, primary: int | None = None, replica: int | None = None
    ) -> AbstractContextManager[list[Read]]:
        """Assert the number of reads by role; None means any number."""
        return assert_num_reads(primary, replica)
