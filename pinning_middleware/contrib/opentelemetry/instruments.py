"""
The metrics. What is counted anyway is read when it is collected, so that counting costs a read
nothing; names and units follow the conventions of OpenTelemetry.
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
from pinning_middleware.contrib.opentelemetry.spans import annotate, waits
from pinning_middleware.signals import replica_wait_finished
from pinning_middleware.utils import counters

__all__ = ["Instruments", "instrument"]

NAME: Final = "pinning_middleware"
# Seconds: PINNING_WAIT is a small part of a request. The SDK's own are for milliseconds.
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Instruments:
    """Everything that is measured, for one pair of providers; ``None``: the site's own."""

    def __init__(
        self,
        meter_provider: MeterProvider | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        try:
            release = version("pinning-middleware")
        except PackageNotFoundError:
            # A copy of the source that nobody installed.
            release = ""
        meter = get_meter(NAME, release, meter_provider)
        self._observe(meter)
        self._waits = meter.create_histogram(
            f"{NAME}.wait.duration",
            unit="s",
            description="For how long a scope waited for a replica that has what it wrote.",
            explicit_bucket_boundaries_advisory=BUCKETS,
        )
        self._span = waits(get_tracer(NAME, release, tracer_provider))

    def start(self) -> None:
        """Watch reads and waits from now on. Again changes nothing."""
        if annotate not in counters.observers:
            counters.observers.append(annotate)
        replica_wait_finished.connect(self._waited, weak=False, dispatch_uid=NAME)

    def stop(self) -> None:
        """Leave reads and waits alone."""
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
            ("reads", "{read}", "Reads that have run.", _reads),
            ("pins", "{pin}", "Pins that were set, carried or rejected.", _pins),
            (
                "fallbacks",
                "{fallback}",
                "Scopes that read elsewhere than their rule says.",
                _fallbacks,
            ),
            ("reruns", "{rerun}", "Reads that ran again on another server.", _reruns),
        ):
            meter.create_observable_counter(
                f"{NAME}.{name}", [_once(count)], unit=unit, description=description
            )
        for name, unit, description, value in (
            ("lag", "s", "The age of what a replica has replayed.", lambda s: s.lag),
            ("behind", "By", "The log that a replica has yet to replay.", lambda s: s.behind_bytes),
            (
                "in_rotation",
                "{replica}",
                "Whether a replica gets reads.",
                lambda s: int(s.state != "out"),
            ),
            ("knowledge.age", "s", "How long ago a replica was last heard of.", lambda s: s.age),
        ):
            meter.create_observable_gauge(
                f"{NAME}.replica.{name}", [_of_replicas(value)], unit=unit, description=description
            )


Found = Iterator[tuple[int, dict[str, str]]]


def _once(count: Callable[[], Found]) -> Callable[[CallbackOptions], Iterator[Observation]]:
    def observe(options: CallbackOptions) -> Iterator[Observation]:
        for number, attributes in count():
            yield Observation(number, attributes)

    return observe


def _of_replicas(
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


def _reads() -> Found:
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
    """Return where an alias leads, for reads of a server that nobody has asked its name."""
    found = [s.address for s in stats.servers() if (s.pool, s.alias) == (pool, alias)]
    return (found[0] if len(found) == 1 else "") or alias


def _pins() -> Found:
    for event, number in stats.get_stats()["pins"].items():
        yield number, {"event": event}


def _fallbacks() -> Found:
    for pool, reasons in stats.get_stats()["fallbacks"].items():
        for reason, number in reasons.items():
            yield number, {"pool": pool, "reason": reason}


def _reruns() -> Found:
    for pool, failed in stats.get_stats()["reruns"].items():
        for alias, served in failed.items():
            for other, number in served.items():
                yield number, {"pool": pool, "failed": alias, "served": other}


_running: Instruments | None = None


def instrument() -> Instruments:
    """Measure for the site's own providers, once for a process, set up by now or later."""
    global _running
    if _running is None:
        _running = Instruments()
    _running.start()
    return _running
