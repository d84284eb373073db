"""What a user may call: the public verbs, re-exported by the package itself."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast, overload

from asgiref.sync import iscoroutinefunction
from django.db import transaction

from . import keyed
from .conf import conf
from .pools import Pool, pools
from .state import Override, current_scope, enter, entered_scope, writes_ignored

__all__ = [
    "acarry_keys",
    "carry_keys",
    "ignore_writes",
    "is_pinned",
    "pin_keys",
    "pin_this_request",
    "unpin_this_request",
    "use_primary",
    "use_replica",
]

P = ParamSpec("P")
R = TypeVar("R")


def pin_this_request(using: str | None = None, seconds: float | None = None) -> None:
    """
    Read from the primary for the rest of this scope, and after it until the window ends or a
    replica has caught up with what the primary has by then.

    ``using`` is a primary's alias, ``None`` every pool. ``seconds`` is a window of its own, which
    no replica ends early. ``ValueError`` for an alias that is no primary, or negative seconds.
    """
    if seconds is not None and seconds < 0:
        raise ValueError(f"seconds must not be negative, not {seconds!r}")
    scope = current_scope()
    for pool in pools().of_primary(using):
        pool.state(scope).pin(seconds)


def unpin_this_request(using: str | None = None) -> None:
    """
    Forget why this scope reads from the primary: its writes so far, its method, a pin by hand
    and the pin it came with, which what follows does not get either. An open transaction and
    the blocks around still count.

    ``using`` as in ``pin_this_request``.
    """
    scope = current_scope()
    for pool in pools().of_primary(using):
        pool.state(scope).unpin()


def is_pinned(using: str | None = None) -> bool:
    """
    Return whether a pin holds for this scope: it wrote, was pinned by hand, is of a method that
    reads from the primary, or carries a pin whose window has not ended.

    ``using`` is a primary's alias, ``None`` any pool. ``ValueError`` for any other alias.
    """
    scope = entered_scope()
    found = pools().of_primary(using)
    return scope is not None and any(pool.is_pinned(scope) for pool in found)


def pin_keys(*keys: str, using: str | None = None) -> None:
    """
    Pin what this scope writes under keys of your choosing, ``"order:42"`` say, for everybody who
    takes them up with ``carry_keys``. Kept in the cache ``PINNING_CACHE`` when the scope ends;
    outside any scope at once, or when the open transaction commits.

    ``using`` is a primary's alias, ``None`` every pool; ``ValueError`` for any other alias.
    """
    found = pools().of_primary(using)
    scope = current_scope()
    if not scope.lasting:
        scope = scope.whole
        scope.pinned_keys = {**scope.pinned_keys, **dict.fromkeys(keys, using)}
        return
    for pool in found:
        transaction.on_commit(functools.partial(_keep_now, pool, keys), using=pool.primary)


def _keep_now(pool: Pool, keys: tuple[str, ...]) -> None:
    keyed.keep(keys, {pool.primary: pool.pin_now(time.time() + conf.seconds)})


def carry_keys(*keys: str) -> None:
    """Let this scope read what was written under these keys, from now on."""
    current_scope().carry(keyed.fetch(keys))


async def acarry_keys(*keys: str) -> None:
    """Do what ``carry_keys`` does, in async code."""
    scope = current_scope()
    scope.carry(await keyed.afetch(keys))


class Block:
    """
    A ``with`` block and a decorator, of functions, coroutine functions and generators of both.

    What is open is kept in a context variable and not in here, so one object may be entered
    again, by many threads and tasks at once.
    """

    def __enter__(self) -> None:
        raise NotImplementedError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        raise NotImplementedError

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        if isinstance(function, type):
            raise TypeError(
                f"{function.__name__} is a class: decorate one of its methods, as in "
                "@method_decorator(use_primary, name='dispatch')"
            )
        if iscoroutinefunction(function):
            wrapper: Any = self._awaiting(function)
        elif inspect.isgeneratorfunction(function):
            wrapper = self._generating(function)
        elif inspect.isasyncgenfunction(function):
            wrapper = self._agenerating(function)
        else:
            wrapper = self._calling(function)
        return cast("Callable[P, R]", functools.wraps(function)(wrapper))

    def _calling(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def calling(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return calling

    def _awaiting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def awaiting(*args: Any, **kwargs: Any) -> Any:
            with self:
                return await function(*args, **kwargs)

        return awaiting

    # Between two of its values a generator's caller is outside the block.

    def _generating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def generating(*args: Any, **kwargs: Any) -> Any:
            values, over = function(*args, **kwargs), object()
            while True:
                with self:
                    value = next(values, over)
                if value is over:
                    return
                yield value

        return generating

    def _agenerating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def generating(*args: Any, **kwargs: Any) -> Any:
            values, over = function(*args, **kwargs), object()
            while True:
                with self:
                    value = await anext(values, over)
                if value is over:
                    return
                yield value

        return generating


class _Override(Block):
    def __init__(self, replica: bool, using: str | None, max_lag: float | None = None) -> None:
        if max_lag is not None and max_lag < 0:
            raise ValueError(f"max_lag must not be negative, not {max_lag!r}")
        self._replica, self._using, self._max_lag = replica, using, max_lag

    def __enter__(self) -> None:
        # Asked for when the block is entered: decorators are made before the settings are.
        pools().of_primary(self._using)
        scope = current_scope()
        block = Override(self._replica, self._using, self._max_lag, scope.override)
        enter(scope.inside(block, scope))

    def __exit__(self, *exc_info: object) -> None:
        scope = entered_scope()
        if scope is not None and scope.outer is not None:
            enter(scope.outer)


class _IgnoreWrites(Block):
    def __enter__(self) -> None:
        writes_ignored.set(writes_ignored.get() + 1)

    def __exit__(self, *exc_info: object) -> None:
        writes_ignored.set(max(writes_ignored.get() - 1, 0))


@overload
def use_primary(using: Callable[P, R]) -> Callable[P, R]: ...
@overload
def use_primary(using: str | None = None) -> Block: ...
def use_primary(using: Any = None) -> Any:
    """
    Read from the primary inside the block or the decorated function. The innermost block wins.

    ``using`` is a primary's alias, ``None`` every pool; ``ValueError``, when the block is
    entered, for any other alias.
    """
    return _Override(False, None)(using) if callable(using) else _Override(False, using)


@overload
def use_replica(using: Callable[P, R]) -> Callable[P, R]: ...
@overload
def use_replica(using: str | None = None, max_lag: float | None = None) -> Block: ...
def use_replica(using: Any = None, max_lag: float | None = None) -> Any:
    """
    Read from a replica inside the block or the decorated function, pinned or not, also inside a
    transaction: for reads that may be stale. The innermost block wins.

    ``using`` as in ``use_primary``. ``max_lag``: seconds behind which a replica will not do; the
    primary serves where none will.
    """
    return _Override(True, None)(using) if callable(using) else _Override(True, using, max_lag)


@overload
def ignore_writes(function: Callable[P, R]) -> Callable[P, R]: ...
@overload
def ignore_writes(function: None = None) -> Block: ...
def ignore_writes(function: Any = None) -> Any:
    """Let the writes inside the block or the decorated function pin nobody."""
    return _IgnoreWrites()(function) if callable(function) else _IgnoreWrites()
