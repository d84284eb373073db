from __future__ import annotations

from collections.abc import Callable
from typing import assert_type

from pinning_middleware import (
    ignore_writes,
    is_pinned,
    pinning_scope,
    propagate_scope,
    use_primary,
    use_replica,
)


@use_primary
def bare(number: int) -> str:
    return str(number)


@use_replica(max_lag=2)
def called(number: int) -> str:
    return str(number)


@ignore_writes
async def awaited(number: int) -> str:
    return str(number)


async def check() -> None:
    assert_type(bare(1), str)
    assert_type(called(1), str)
    assert_type(await awaited(1), str)
    assert_type(is_pinned(using="default"), bool)
    with use_primary("default"), pinning_scope() as scope:
        assert_type(scope.token, str | None)
    work: Callable[[int], str] = propagate_scope(bare)
    assert_type(work(1), str)
