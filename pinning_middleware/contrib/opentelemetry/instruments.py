"""
The metrics. Existing counters are read on collection, so metrics add no cost to a read. Names and
units follow OpenTelemetry's conventions.
https://opentelemetry.io/docs/specs/semconv/general/metrics/
"""

from __future__ import annotations

from collections import defaultdict
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
# Counters of get_stats(): name, unit, description, and an attribute for each level.
COUNTERS: Final = (
    ("pins", "{pin}", "Pins that were set, inherited, rejected or lost.", ("event",)),
    (
        "fallbacks",
        "{fallback}",
        "Scopes that read from another role than intended.",
        ("pool", "reason"),
    ),
    (
        "retries",
        "{retry}",
        "Reads that were retried on another server.",
        ("pool", "failed", "served"),
    ),
    (
        "retry_404",
        "{request}",
        "Views that ended in 404 on a replica, by the answer of the primary.",
        ("result",),
    ),
    (
        "task_retries",
        "{task}",
        "Tasks that found no replica which had caught up, by what became of them.",
        ("result",),
    ),
)


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
        self, sender: str, replica: str | None, seconds: float, reached: bool, **kwargs: Any
    ) -> None:
        alias = {} if replica is None else {"alias": replica}
        self._waits.record(seconds, {"pool": sender, **alias, "reached": reached})
        self._span(sender=sender, replica=replica, seconds=seconds, reached=reached)

    def _observe(self, meter: Meter) -> None:
        meter.create_observable_counter(
            f"{NAME}.reads", [_observe_reads], unit="{read}", description="Completed reads."
        )
        for name, unit, description, labels in COUNTERS:
            meter.create_observable_counter(
                f"{NAME}.{name}",
                [_counter_callback(name, labels)],
                unit=unit,
                description=description,
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
            ("probe.age", "s", "Time since a replica was last probed.", lambda s: s.age),
        ):
            meter.create_observable_gauge(
                f"{NAME}.replica.{name}",
                [_gauge_callback(value)],
                unit=unit,
                description=description,
            )


Callback = Callable[[CallbackOptions], Iterator[Observation]]


def _counter_callback(name: str, labels: tuple[str, ...]) -> Callback:
    def observe(options: CallbackOptions) -> Iterator[Observation]:
        return _flatten(stats.get_stats()[name], labels, {})

    return observe


def _flatten(
    counts: Any, labels: tuple[str, ...], attributes: dict[str, str]
) -> Iterator[Observation]:
    """Yield the counts of nested dictionaries, with one attribute for each level."""
    if not labels:
        yield Observation(counts, attributes)
        return
    for value, inner in counts.items():
        yield from _flatten(inner, labels[1:], {**attributes, labels[0]: value})


def _gauge_callback(
    value: Callable[[stats.ServerState], float | None],
) -> Callback:
    def observe(options: CallbackOptions) -> Iterator[Observation]:
        for state in stats.servers():
            if state.configured == "replica" and (found := value(state)) is not None:
                address = state.address or state.alias
                yield Observation(
                    found, {"pool": state.pool, "alias": state.alias, "server": address}
                )

    return observe


def _observe_reads(options: CallbackOptions) -> Iterator[Observation]:
    labels = ("pool", "alias", "server", "reason")
    counted: defaultdict[tuple[str, ...], float] = defaultdict(int)
    for observation in _flatten(stats.get_stats()["reads"], labels, {}):
        attributes = observation.attributes or {}
        pool, alias, address, reason = (str(attributes[label]) for label in labels)
        # The configured address, which does not change, stands for servers not identified yet.
        address = address or stats.address_of(alias, None) or alias
        counted[pool, alias, address, reason] += observation.value
    for key, number in counted.items():
        role = "primary" if key[1] == key[0] else "replica"
        yield Observation(number, {**dict(zip(labels, key, strict=True)), "role": role})


_running: Instruments | None = None


def instrument() -> Instruments:
    """Start recording for the global providers, which may be set later. Idempotent."""
    global _running
    if _running is None:
        _running = Instruments()
    _running.start()
    return _running
