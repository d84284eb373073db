"""
RQ: a job that is enqueued after a write reads that write.

Tell queues and workers of this class of jobs::

    queue = Queue(connection=redis, job_class=PinnedJob)
    rq worker --job-class pinning_middleware.contrib.rq.PinnedJob

    RQ = {"JOB_CLASS": "pinning_middleware.contrib.rq.PinnedJob"}    # django-rq's setting

The pins travel in the job's ``meta``. In the worker each job is a scope that begins with them, and
with what the jobs that it depends on have left behind; a retry begins with what the attempts before
it have. Callbacks (``on_success=…``) run outside of it.
"""

from __future__ import annotations

from typing import Any, cast

from rq.job import Job

from pinning_middleware import tokens
from pinning_middleware.pins import Pins, merge_pins
from pinning_middleware.routing.outgoing import current_token
from pinning_middleware.scope_blocks import PinningScope
from pinning_middleware.scopes.scope import Scope, entered_scope

__all__ = ["META", "PinnedJob"]

META = "pinning_token"


class PinnedJob(Job):
    """A job that carries pins."""

    @classmethod
    def create(cls, *args: Any, **kwargs: Any) -> PinnedJob:
        job = cast("PinnedJob", super().create(*args, **kwargs))
        job._note(current_token())
        return job

    def perform(self) -> Any:
        outer = entered_scope()
        # One that runs in place is part of who called it; a worker serves strangers by turns.
        is_alone = outer is None or outer.is_lasting
        with PinningScope(scope=Scope.of(self._pins()), isolated=is_alone) as block:
            try:
                return super().perform()
            finally:
                if self._note(block.token):
                    self.save_meta()  # type: ignore[no-untyped-call]

    def _pins(self) -> Pins:
        jobs = [self, *self.fetch_dependencies()]
        return merge_pins(*[tokens.accept(job.meta[META]) for job in jobs if META in job.meta])

    def _note(self, token: str | None) -> bool:
        """Keep a token for whoever runs or follows this job; return whether that is news."""
        before = self.meta.get(META)
        # A copy, since callers hand the same dictionary to many.
        self.meta = {name: value for name, value in self.meta.items() if name != META}
        if token is not None:
            self.meta[META] = token
        return token != before
