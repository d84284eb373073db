"""Hypothesis strategies for pins. Values are few and close together, so that they often meet."""

from __future__ import annotations

from hypothesis import strategies as st

from pinning_middleware.pins import Pin, PinKey, PinKind, Position

LOGS = ("a", "b", "c")
TIMES = st.integers(1, 5).map(float)
OFFSETS = st.integers(0, 3)
ANY_LOGS = st.frozensets(st.sampled_from(LOGS), min_size=1)
SAME_LOGS = st.just(frozenset(LOGS[:2]))
KEYS = st.sampled_from(
    [PinKey("default"), PinKey("default", PinKind.OBSERVED), PinKey("users"), PinKey("other")]
)


@st.composite
def positions(draw: st.DrawFn, logs: st.SearchStrategy[frozenset[str]] = ANY_LOGS) -> Position:
    """Positions in some logs, by default in any; some of them count only where replicated."""
    chosen = draw(logs)
    points = {log: draw(OFFSETS) for log in sorted(chosen)}
    return Position(points, draw(st.frozensets(st.sampled_from(sorted(chosen)))))


ANY_POSITION = positions()


def pins(
    position: st.SearchStrategy[Position] = ANY_POSITION,
    times: st.SearchStrategy[float] = TIMES,
) -> st.SearchStrategy[Pin]:
    """Pins with and without a position."""
    with_position = st.tuples(times, st.none() | times, position)
    return st.tuples(times).map(lambda values: Pin(*values)) | with_position.map(
        lambda values: Pin(*values)
    )


PINS_OF_SAME_LOGS = pins(positions(SAME_LOGS))
REPLAYED = st.dictionaries(st.sampled_from(LOGS), OFFSETS)
