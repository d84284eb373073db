"""
RQ: a job that is enqueued after a write reads that write.

Set the job class of queues and workers::

    queue = Queue(connection=redis, job_class=PinnedJob)
    rq worker --job-class pinning_middleware.contrib.rq.PinnedJob

    RQ = {"JOB_CLASS": "pinning_middleware.contrib.rq.PinnedJob"}    # django-rq's setting

The pins travel in the job's ``meta``. In the worker, each job runs in a scope that begins with
these pins and with the outgoing pins of the jobs that it depends on. A retry inherits the pins of
earlier attempts. Callbacks (``on_success=…``) run outside the scope.
"""

from __future__ import annotations

from typing import Any, cast

from rq.job import Job

from pinning_middleware import handoff
from pinning_middleware.pins import Pins, merge_pins

__all__ = ["META", "PinnedJob"]

META = "pinning_token"


class PinnedJob(Job):
    """A job that propagates pins."""

    @classmethod
    def create(cls, *args: Any, **kwargs: Any) -> PinnedJob:
        job = cast("PinnedJob", super().create(*args, **kwargs))
        job._set_token(handoff.token_to_send())
        return job

    def perform(self) -> Any:
        with handoff.task_scope(self._inherited_pins()) as scope:
            try:
                return super().perform()
            finally:
                if self._set_token(scope.token):
                    self.save_meta()  # type: ignore[no-untyped-call]

    def _inherited_pins(self) -> Pins:
        dependencies = self.fetch_dependencies()
        jobs = [self, *dependencies]
        pins = handoff.pins_of_tokens(*[job.meta.get(META) for job in jobs])
        if len(dependencies) < len(self._dependency_ids):
            # A dependency has expired, and its pins with it; with result_ttl=0 it does at once.
            return merge_pins(pins, handoff.pins_of_all_writes())
        return pins

    def _set_token(self, token: str | None) -> bool:
        """Store a token in ``meta``; return whether it has changed."""
        before = self.meta.get(META)
        # Copy, because callers may pass the same dictionary to several jobs.
        self.meta = {name: value for name, value in self.meta.items() if name != META}
        if token is not None:
            self.meta[META] = token
        return token != before
