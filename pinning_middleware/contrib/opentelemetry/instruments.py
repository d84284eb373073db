"""
The metrics. Existing counters are read on collection, so metrics add no cost to a read. Names and
units follow OpenTelemetry's conventions.
https://opentelemetry.io/docs/specs/semconv/general/metrics/
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation, get_meter
from opentelemetry.trace import TracerProvider, get_tracer

from pinning_middleware import stats
from pinning_middleware.contrib.opentelemetry.spans import annotate, wait_receiver
from pinning_middleware.signals import replica_wait_finished
from pinning_middleware.utils import counters

__all__ = ["Instruments", "instrument"]

NAME: Final = "pinning_middleware"
# Histogram boundaries (seconds). The SDK's defaults are for milliseconds.
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Instruments:
    """The instruments of one pair of providers; None means the global ones."""

    def __init__(
        self,
        meter_provider: MeterProvider | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        try:
            release = version("pinning-middleware")
        except PackageNotFoundError:
            # A source checkout that is not installed.
            release = ""
        meter = get_meter(NAME, release, meter_provider)
        self._observe(meter)
        self._waits = meter.create_histogram(
            f"{NAME}.wait.duration",
            unit="s",
            description="Time that a scope waited for a replica to catch up.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self._span = wait_receiver(get_tracer(NAME, release, tracer_provider))

    def start(self) -> None:
        """Start recording. Idempotent."""
        if annotate not in counters.observers:
            counters.observers.append(annotate)
        replica_wait_finished.connect(self._waited, weak=False, dispatch_uid=NAME)

    def stop(self) -> None:
        """Stop recording."""
        if annotate in counters.observers:
            counters.observers.remove(annotate)
        replica_wait_finished.disconnect(self._waited, dispatch_uid=NAME)

    def _waited(
        self, sender: str, replica: str, seconds: float, reached: bool, **kwargs: Any
    ) -> None:
        self._waits.record(seconds, {"pool": sender, "alias": replica, "reached": reached})
        self._span(sender=sender, replica=replica, seconds=seconds, reached=reached)

    def _observe(self, meter: Meter) -> None:
        for name, unit, description, count in (
            ("reads", "{read}", "Completed reads.", _reads),
            ("pins", "{pin}", "Pins that were set, inherited or rejected.", _pins),
            (
                "fallbacks",
                "{fallback}",
                "Scopes that read from another role than intended.",
                _fallbacks,
            ),
            ("retries", "{retry}", "Reads that were retried on another server.", _retries),
            (
                "retry_404",
                "{request}",
                "Views that ended in 404 on a replica, by the answer of the primary.",
                _retries_404,
            ),
            (
                "task_retries",
                "{task}",
                "Tasks that found no replica which had caught up, by what became of them.",
                _task_retries,
            ),
        ):
            meter.create_observable_counter(
                f"{NAME}.{name}", [_counter_callback(count)], unit=unit, description=description
            )
        for name, unit, description, value in (
            ("lag", "s", "Replication lag of a replica.", lambda s: s.lag),
            (
                "behind",
                "By",
                "Size of the log that a replica has yet to replay.",
                lambda s: s.behind_bytes,
            ),
            (
                "in_rotation",
                "{replica}",
                "Whether a replica is in rotation (1) or out of rotation (0).",
                lambda s: int(s.state != "out"),
            ),
            ("knowledge.age", "s", "Time since a replica was last probed.", lambda s: s.age),
        ):
            meter.create_observable_gauge(
                f"{NAME}.replica.{name}",
                [_gauge_callback(value)],
                unit=unit,
                description=description,
            )


Measurements = Iterator[tuple[int, dict[str, str]]]


def _counter_callback(
    count: Callable[[], Measurements],
) -> Callable[[CallbackOptions], Iterator[Observation]]:
    def observe(options: CallbackOptions) -> Iterator[Observation]:
        for number, attributes in count():
            yield Observation(number, attributes)

    return observe


def _gauge_callback(
    value: Callable[[stats.ServerState], float | None],
) -> Callable[[CallbackOptions], Iterator[Observation]]:
    def observe(options: CallbackOptions) -> Iterator[Observation]:
        for state in stats.servers():
            if state.configured == "replica" and (found := value(state)) is not None:
                address = state.address or state.alias
                yield Observation(
                    found, {"pool": state.pool, "alias": state.alias, "server": address}
                )

    return observe


def _reads() -> Measurements:
    counted: Counter[tuple[str, str, str, str]] = Counter()
    for pool, aliases in stats.get_stats()["reads"].items():
        for alias, addresses in aliases.items():
            for address, reasons in addresses.items():
                where = pool, alias, address or _only_address(pool, alias)
                for reason, number in reasons.items():
                    counted[*where, reason] += number
    for (pool, alias, address, reason), number in counted.items():
        yield (
            number,
            {
                "pool": pool,
                "alias": alias,
                "server": address,
                "role": "primary" if alias == pool else "replica",
                "reason": reason,
            },
        )


def _only_address(pool: str, alias: str) -> str:
    """Return the address behind an alias, for reads of an unidentified server."""
    found = [s.address for s in stats.servers() if (s.pool, s.alias) == (pool, alias)]
    return (found[0] if len(found) == 1 else "") or alias


def _pins() -> Measurements:
    for event, number in stats.get_stats()["pins"].items():
        yield number, {"event": event}


def _fallbacks() -> Measurements:
    for pool, reasons in stats.get_stats()["fallbacks"].items():
        for reason, number in reasons.items():
            yield number, {"pool": pool, "reason": reason}


def _retries() -> Measurements:
    for pool, failed in stats.get_stats()["retries"].items():
        for alias, served in failed.items():
            for other, number in served.items():
                yield number, {"pool": pool, "failed": alias, "served": other}


def _retries_404() -> Measurements:
    for result, number in stats.get_stats()["retry_404"].items():
        yield number, {"result": result}


def _task_retries() -> Measurements:
    for result, number in stats.get_stats()["task_retries"].items():
        yield number, {"result": result}


_running: Instruments | None = None


def instrument() -> Instruments:
    """Start recording for the global providers, which may be set later. Idempotent."""
    global _running
    if _running is None:
        _running = Instruments()
    _running.start()
    return _running
