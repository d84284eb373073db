"""``with`` blocks that are decorators too, of functions and generators, sync and async."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from asgiref.sync import iscoroutinefunction

from pinning_middleware.scopes.overrides import Kind, close, open_block

__all__ = ["Block", "aiterate_within", "async_body_of", "close_within", "iterate_within"]

P = ParamSpec("P")
R = TypeVar("R")


class Block(AbstractContextManager[None]):
    """
    A ``with`` block and a decorator, of functions, coroutine functions and generators of both.

    What is open is kept in a context variable and not in here, so one object may be entered
    again, by many threads and tasks at once. A lazy body (a streaming response, a template that
    is still to be rendered) that leaves a decorated function belongs to its block.
    """

    def __init__(
        self,
        kind: Kind,
        using: str | None = None,
        max_lag: float | None = None,
        check: Callable[[str | None], object] | None = None,
    ) -> None:
        self._kind, self._using, self._max_lag, self._check = kind, using, max_lag, check

    def __enter__(self) -> None:
        if self._check is not None:
            # When it is entered: decorators are made before the settings are.
            self._check(self._using)
        open_block(self._kind, self, self._using, self._max_lag)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        close(self)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        if isinstance(function, type):
            raise TypeError(
                f"{function.__name__} is a class: decorate one of its methods, as in "
                f"@method_decorator({self._kind.value}, name='dispatch')"
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
                result = function(*args, **kwargs)
            # `dispatch` of an async view, say, is a plain function.
            return self._awaited(result) if inspect.iscoroutine(result) else self._lazily(result)

        return calling

    def _awaiting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def awaiting(*args: Any, **kwargs: Any) -> Any:
            return await self._awaited(function(*args, **kwargs))

        return awaiting

    async def _awaited(self, coroutine: Awaitable[Any]) -> Any:
        with self:
            result = await coroutine
        return self._lazily(result)

    # Between two of its values a generator's caller is outside the block.

    def _generating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def generating(*args: Any, **kwargs: Any) -> Any:
            generator = function(*args, **kwargs)
            step = functools.partial(generator.send, None)
            while True:
                with self:
                    try:
                        value = step()
                    except StopIteration as stop:
                        return stop.value
                try:
                    sent = yield value
                except GeneratorExit:
                    with self:
                        generator.close()
                    raise
                except BaseException as error:
                    step = functools.partial(generator.throw, error)
                else:
                    step = functools.partial(generator.send, sent)

        return generating

    def _agenerating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def generating(*args: Any, **kwargs: Any) -> Any:
            generator = function(*args, **kwargs)
            step = functools.partial(generator.asend, None)
            while True:
                with self:
                    try:
                        value = await step()
                    except StopAsyncIteration:
                        return
                try:
                    sent = yield value
                except GeneratorExit:
                    with self:
                        await generator.aclose()
                    raise
                except BaseException as error:
                    step = functools.partial(generator.athrow, error)
                else:
                    step = functools.partial(generator.asend, sent)

        return generating

    # Bodies that are made later

    def _lazily(self, result: Any) -> Any:
        if getattr(result, "streaming", False):
            if getattr(result, "file_to_stream", None) is None:
                close_within(self, result)
                if result.is_async:
                    result.streaming_content = aiterate_within(self, *async_body_of(result))
                else:
                    result.streaming_content = iterate_within(self, result.streaming_content)
        elif getattr(result, "is_rendered", True) is False:
            render = result.render

            def render_inside() -> Any:
                # A response is pickled by caches without what it was rendered by. Another block
                # around this one has taken it away already.
                result.__dict__.pop("render", None)
                with self:
                    return render()

            result.render = render_inside
        return result


def close_within(block: AbstractContextManager[object], response: Any) -> None:
    """
    Let what a streaming body does at its end be done inside a block, also where the client went
    away: a server then closes the response, and that the generators, before the parts' own.
    """

    def inside(close: Callable[[], object]) -> None:
        with block:
            close()

    closers = response._resource_closers
    closers[:] = [functools.partial(inside, close) for close in closers]


def async_body_of(response: Any) -> tuple[AsyncIterator[bytes], Any]:
    """Return the parts of an async body, and what they come from: to end them does not end that."""
    return response.streaming_content, response._iterator


def iterate_within(
    block: AbstractContextManager[object], content: Iterator[bytes]
) -> Iterator[bytes]:
    """Make each part of a streaming body inside a block, and end the body there too."""
    over = object()
    try:
        while True:
            with block:
                part: Any = next(content, over)
            if part is over:
                return
            yield part
    finally:
        with block:
            getattr(content, "close", bool)()


async def aiterate_within(
    block: AbstractContextManager[object], content: AsyncIterator[bytes], source: Any
) -> AsyncIterator[bytes]:
    """Do what ``iterate_within`` does, for an async body."""
    over = object()
    try:
        while True:
            with block:
                part: Any = await anext(content, over)
            if part is over:
                return
            yield part
    finally:
        with block:
            for one in (content, source):
                if hasattr(one, "aclose"):
                    await one.aclose()
