"""Context managers that are decorators too, of functions and generators, sync and async."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar, cast

from asgiref.sync import iscoroutinefunction

from pinning_middleware.backend.responses import render_within
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.overrides import OverrideKind, pop, push

P = ParamSpec("P")
R = TypeVar("R")


class Block(AbstractContextManager[None]):
    """
    A context manager and a decorator, of functions, coroutine functions and generators of both.

    What is active is kept in a context variable, so one object may be entered again, by many
    threads and tasks at once. A streaming or template response that a decorated function returns is
    produced inside the block.
    """

    def __init__(
        self,
        kind: OverrideKind,
        using: str | None = None,
        max_lag: float | None = None,
        group: str | None = None,
    ) -> None:
        self._kind, self._using, self._max_lag, self._group = kind, using, max_lag, group

    def __enter__(self) -> None:
        # Check on entry, since decorators run before the settings are complete.
        if self._group is not None:
            _check_group(self._group, self._using)
        elif self._using is not None:
            pools().of_primary(self._using)
        push(self._kind, self, self._using, self._max_lag, self._group)

    def __exit__(self, *exc_info: object) -> None:
        pop(self)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        pop(self)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        if isinstance(function, type):
            raise TypeError(
                f"{function.__name__} is a class. Decorate one of its methods: "
                f"@method_decorator({self._kind.value}, name='dispatch')"
            )
        if iscoroutinefunction(function):
            wrapper: Any = self._wrap_coroutine(function)
        elif inspect.isgeneratorfunction(function):
            wrapper = generate_within(lambda: self, function)
        elif inspect.isasyncgenfunction(function):
            wrapper = agenerate_within(lambda: self, function)
        else:
            wrapper = self._wrap_function(function)
        return cast("Callable[P, R]", functools.wraps(function)(wrapper))

    def _wrap_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                result = function(*args, **kwargs)
            # dispatch() of an async view is a plain function, for example.
            is_coroutine = inspect.iscoroutine(result)
            return self._await_inside(result) if is_coroutine else self._wrap_response(result)

        return call

    def _wrap_coroutine(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._await_inside(function(*args, **kwargs))

        return call

    async def _await_inside(self, coroutine: Awaitable[Any]) -> Any:
        with self:
            result = await coroutine
        return self._wrap_response(result)

    def _wrap_response(self, result: Any) -> Any:
        if getattr(result, "streaming", False) is True:
            if getattr(result, "file_to_stream", None) is None:
                run_closers_within(self, result)
                if result.is_async:
                    result.streaming_content = aiterate_within(self, *async_body_of(result))
                else:
                    result.streaming_content = iterate_within(self, result.streaming_content)
        elif getattr(result, "is_rendered", True) is False:
            render_within(result, self)
        return result


# The caller of a generator is outside the block between two values.


def generate_within(
    open_block: Callable[[], AbstractContextManager[None]], function: Callable[..., Any]
) -> Callable[..., Any]:
    """
    Return a generator function whose body runs inside a block, which is entered for each value.
    ``open_block`` is called once for each generator.
    """

    def generate(*args: Any, **kwargs: Any) -> Any:
        generator, block = function(*args, **kwargs), open_block()
        step = functools.partial(generator.send, None)
        while True:
            with block:
                try:
                    value = step()
                except StopIteration as stop:
                    return stop.value
            try:
                sent = yield value
            except GeneratorExit:
                with block:
                    generator.close()
                raise
            except BaseException as error:
                step = functools.partial(generator.throw, error)
            else:
                step = functools.partial(generator.send, sent)

    return generate


def agenerate_within(
    open_block: Callable[[], AbstractContextManager[None]], function: Callable[..., Any]
) -> Callable[..., Any]:
    """Async version of ``generate_within()``."""

    async def generate(*args: Any, **kwargs: Any) -> Any:
        generator, block = function(*args, **kwargs), open_block()
        step = functools.partial(generator.asend, None)
        while True:
            with block:
                try:
                    value = await step()
                except StopAsyncIteration:
                    return
            try:
                sent = yield value
            except GeneratorExit:
                with block:
                    await generator.aclose()
                raise
            except BaseException as error:
                step = functools.partial(generator.athrow, error)
            else:
                step = functools.partial(generator.asend, sent)

    return generate


def _check_group(group: str, using: str | None) -> None:
    # A site without replicas, as on a developer's machine, has no groups either.
    found = [pool.spec for pool in pools().of_primary(using) if pool.replicas]
    groups = {name for spec in found for name in spec.groups}
    if found and group not in groups:
        known = ", ".join(map(repr, sorted(groups))) or "none is configured"
        raise ValueError(f"{group!r} is not a group of PINNING_REPLICAS ({known})")


def run_closers_within(block: AbstractContextManager[object], response: Any) -> None:
    """
    Run the closers of a streaming body inside a block. If the client disconnects, a server closes
    the response, and so the generators, before the iterator of the parts.
    """

    def inside(close: Callable[[], object]) -> None:
        with block:
            close()

    closers = response._resource_closers
    closers[:] = [functools.partial(inside, close) for close in closers]


def async_body_of(response: Any) -> tuple[AsyncIterator[bytes], Any]:
    """Return the chunks of an async body, and their source, which must be closed separately."""
    return response.streaming_content, response._iterator


def iterate_within(
    block: AbstractContextManager[object], content: Iterator[bytes]
) -> Iterator[bytes]:
    """Produce each part of a streaming body inside a block, and close the body there too."""
    end = object()
    try:
        while True:
            with block:
                part: Any = next(content, end)
            if part is end:
                return
            yield part
    finally:
        with block:
            getattr(content, "close", bool)()


async def aiterate_within(
    block: AbstractContextManager[object], content: AsyncIterator[bytes], source: Any
) -> AsyncIterator[bytes]:
    """Async version of ``iterate_within()``."""
    end = object()
    try:
        while True:
            with block:
                part: Any = await anext(content, end)
            if part is end:
                return
            yield part
    finally:
        with block:
            for iterator in (content, source):
                if hasattr(iterator, "aclose"):
                    await iterator.aclose()
