"""
Fixtures and a marker for pytest, registered by an entry point.

Neither Django nor the rest of the package is imported before a test uses one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pinning_middleware.testing import Read, Replicas

__all__ = [
    "capture_reads",
    "django_assert_num_reads",
    "django_assert_reads_from",
    "pinning_replicas",
]

# Tests that use one of these fixtures, or the marker, start without pins in the cache.
FIXTURES = frozenset(__all__)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "pinning(lag=None, *, forbid_stale_reads=True): run the test while replicas lag (an alias, "
        "a list of aliases, or True for all). Stale reads fail the test.",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    used = FIXTURES.intersection(getattr(item, "fixturenames", ()))
    if not used and item.get_closest_marker("pinning") is None:
        return (yield)
    from pinning_middleware.testing import isolated_pins

    with isolated_pins():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    marker = item.get_closest_marker("pinning")
    if marker is None:
        return (yield)
    with _marked(*marker.args, **marker.kwargs):
        return (yield)


@contextmanager
def _marked(
    lag: str | list[str] | tuple[str, ...] | bool | None = None,
    *more: object,
    forbid_stale_reads: bool = True,
) -> Iterator[None]:
    from pinning_middleware import testing
    from pinning_middleware.testing.clock import reset_window

    if more:
        raise TypeError(f"pinning() takes one alias, a list of aliases or True, not also {more!r}")
    if not lag:
        yield
        return
    chosen = [lag] if isinstance(lag, str) else lag
    aliases = () if isinstance(chosen, bool) else tuple(chosen)
    try:
        testing.replicas.lag(*aliases)
        with testing.forbid_stale_reads() if forbid_stale_reads else nullcontext():
            yield
    finally:
        testing.replicas.reset()
        reset_window()


@pytest.fixture
def capture_reads() -> Callable[[], AbstractContextManager[list[Read]]]:
    """Return a context manager that yields a list of the reads inside it."""
    from pinning_middleware.testing import capture_reads

    return capture_reads


@pytest.fixture
def django_assert_reads_from() -> Callable[..., AbstractContextManager[list[Read]]]:
    """Return a context manager that asserts where reads go: ``(where, reason=None)``."""
    from pinning_middleware.testing import assert_reads_from

    return assert_reads_from


@pytest.fixture
def django_assert_num_reads() -> Callable[..., AbstractContextManager[list[Read]]]:
    """Return a context manager that counts reads: ``(primary=None, replica=None)``."""
    from pinning_middleware.testing import assert_num_reads

    return assert_num_reads


@pytest.fixture
def pinning_replicas() -> Iterator[Replicas]:
    """Return the object that controls replicas; reset it at the end of the test."""
    from pinning_middleware.testing import replicas
    from pinning_middleware.testing.clock import reset_window

    yield replicas
    replicas.reset()
    reset_window()
