"""Detect reads and updates that use stale data, while a test makes replicas lag."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from django.db.models import Model
from django.db.models.signals import post_init, post_save, pre_save

from pinning_middleware.reasons import Reason
from pinning_middleware.testing.reads import (
    REPLICA,
    Violations,
    calling_line,
    observe_reads,
    tables_of,
)
from pinning_middleware.testing.replicas import replicas
from pinning_middleware.utils import counters


class StaleRead(AssertionError):
    """Raised if a lagging replica is read for a table that was written since it lags."""


class LostUpdate(StaleRead):
    """Raised if all fields of an instance are saved that was read from a lagging replica."""


@contextmanager
def forbid_stale_reads() -> Iterator[None]:
    """
    Forbid reads and updates that depend on stale data, while ``replicas.lag()`` is in effect.

    Raise StaleRead for a read from a lagging replica of a table that was written since it lags,
    unless ``use_replica`` allows it. Raise LostUpdate if an instance that was read from a lagging
    replica is saved without ``update_fields``: the save would overwrite newer values of the other
    fields. Both messages name the two lines of the site. Each error is raised again at the end of
    the context if the code has caught it.
    """
    violations = Violations()
    origins = _Origins(violations)

    def check(read: counters.Read) -> None:
        origins.record(read)
        if not _is_lagging(read) or read.reason == Reason.USE_REPLICA:
            return
        for table in tables_of(read.sql):
            written_at = replicas.written_since(read.alias, table)
            if written_at is not None:
                violations.add(
                    StaleRead(
                        f"{calling_line()} reads {table} from {read.alias} ({read.reason}), which "
                        f"lags: it was written at {written_at}. {read.sql[:120]}"
                    )
                )

    with origins.tracked(), observe_reads(check):
        yield
    violations.check()


def _is_lagging(read: counters.Read) -> bool:
    return read.role == REPLICA and read.alias in replicas.lagging


class _Origin(NamedTuple):
    """The lagging replica that an instance was read from, and the line that read it."""

    alias: str
    line: str


class _Origins(threading.local):
    """
    Tracks which instances were read from a lagging replica.

    A new instance belongs to the last read of its table in the same thread. The origin is stored in
    the instance's ``_state``, where a copy keeps it.
    """

    def __init__(self, violations: Violations) -> None:
        self.violations = violations
        self.by_table: dict[str, _Origin | None] = {}

    def record(self, read: counters.Read) -> None:
        origin = _Origin(read.alias, calling_line()) if _is_lagging(read) else None
        for table in tables_of(read.sql):
            self.by_table[table] = origin

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Track instances by Django's signals and by ``refresh_from_db()``."""
        original = Model.refresh_from_db
        origins = self

        def refresh_from_db(
            instance: Model, using: Any = None, fields: Any = None, *args: Any, **kwargs: Any
        ) -> None:
            original(instance, using, fields, *args, **kwargs)
            if fields is None:
                origins.set_origin(instance=instance)

        receivers = (
            (post_init, self.set_origin),
            (pre_save, self.check_save),
            (post_save, self.clear_origin),
        )
        for signal, receiver in receivers:
            signal.connect(receiver, weak=False)
        Model.refresh_from_db = refresh_from_db  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            Model.refresh_from_db = original  # type: ignore[method-assign]
            for signal, receiver in receivers:
                signal.disconnect(receiver)

    def set_origin(self, *, instance: Any, **kwargs: Any) -> None:
        origin = self.by_table.get(instance._meta.db_table.lower())
        if origin is not None or hasattr(instance._state, "pinning_origin"):
            instance._state.pinning_origin = origin

    def clear_origin(self, *, instance: Any, **kwargs: Any) -> None:
        if hasattr(instance._state, "pinning_origin"):
            instance._state.pinning_origin = None

    def check_save(
        self, *, instance: Any, raw: bool, update_fields: Any = None, **kwargs: Any
    ) -> None:
        origin: _Origin | None = getattr(instance._state, "pinning_origin", None)
        # A new row overwrites nothing.
        if origin is None or raw or update_fields is not None or instance._state.adding:
            return
        self.violations.add(
            LostUpdate(
                f"{calling_line()} saves all fields of {instance._meta.label} {instance.pk}, which "
                f"{origin.line} has read from {origin.alias}, which lags: newer values of other "
                "fields would be lost. Save with update_fields, or read the instance from the "
                "primary."
            )
        )
