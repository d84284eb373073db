"""Faults of the addresses of replicas, in a layout where each alias has a link."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from tests.real.layouts import Place, black_hole

from .context import FaultContext

__all__ = ["ADDRESS_FAULTS"]


def move_address(context: FaultContext) -> None:
    """The alias of a replica resolves to another replica, or to the primary."""
    alias = _replica_alias(context)
    others = [node for name, node in context.cluster.nodes.items() if name != alias]
    with _pointing(context, {alias: context.rng.choice(others)}):
        context.wait(1, 3)


def swap_addresses(context: FaultContext) -> None:
    """The aliases of the two replicas change places while one of them lags."""
    one, other = context.cluster.replicas
    lagging = context.rng.choice((one, other))
    places = {"replica1": other, "replica2": one}
    try:
        lagging.pause()
        with _pointing(context, places):
            context.wait(0.5, 2)
    finally:
        lagging.resume()


def black_hole_replica(context: FaultContext) -> None:
    with black_hole() as hole, _pointing(context, {_replica_alias(context): hole}):
        context.wait(1, 3)


def delay_replica(context: FaultContext) -> None:
    link = context.links[_replica_alias(context)]
    try:
        link.delay = context.rng.uniform(0.01, 0.1)
        context.wait(0.5, 2)
    finally:
        link.delay = 0.0


def reset_results(context: FaultContext) -> None:
    """Every result of a replica breaks off in the middle."""
    link = context.links[_replica_alias(context)]
    try:
        link.resets = True
        context.wait(0.2, 1)
    finally:
        link.resets = False


def _replica_alias(context: FaultContext) -> str:
    return context.rng.choice([alias for alias in context.links if alias != "default"])


@contextmanager
def _pointing(context: FaultContext, places: Mapping[str, Place]) -> Iterator[None]:
    """Let aliases lead elsewhere; connections that are open may stay where they are."""
    cut = context.rng.random() < 0.5
    try:
        for alias, place in places.items():
            context.links[alias].point_to(place, cut)
        yield
    finally:
        for alias in places:
            context.links[alias].point_to(context.cluster.nodes[alias])


ADDRESS_FAULTS: Final[Mapping[Callable[[FaultContext], None], tuple[list[str], int]]] = {
    move_address: ([], 2),
    swap_addresses: ([], 3),
    black_hole_replica: ([], 1),
    delay_replica: ([], 2),
    reset_results: ([], 2),
}
