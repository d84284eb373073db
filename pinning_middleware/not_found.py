"""
A view that finds nothing on a replica is retried once on the primary.

A pin protects the client that has written. Another user who is sent the link to a new row reads a
replica that may not have it yet: a 404 for something that exists. With ``PINNING_RETRY_404`` a GET
or HEAD whose view ends in 404 has its view retried, in the same request and inside the same
middleware, if the view has read a replica and nothing was written. The second response is returned.

A limit for each process bounds the load on the primary, since most 404s are right.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final, ParamSpec, TypeVar, overload

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.core.exceptions import ObjectDoesNotExist
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpRequest

from pinning_middleware.conf import RETRY_404_SHARE, conf
from pinning_middleware.decorators import Block
from pinning_middleware.reasons import Reason
from pinning_middleware.scopes.overrides import OverrideKind
from pinning_middleware.scopes.scope import Scope, current_scope
from pinning_middleware.scopes.watch import Watch
from pinning_middleware.utils import clock, counters
from pinning_middleware.utils.forks import ForkSafeLock
from pinning_middleware.utils.logging import log_rate_limited

P = ParamSpec("P")
R = TypeVar("R")
IsMiss = Callable[[Any], object]

RETRIED_METHODS: Final = ("GET", "HEAD")
MISSES: Final = (Http404, ObjectDoesNotExist)
# The code chose a replica for these reads, and would choose it again.
_EXPLICIT_REASONS: Final = (Reason.USE_REPLICA, Reason.EXPLICIT)

logger = logging.getLogger("pinning_middleware")


class RetryLimit:
    """A token bucket: a share of the requests may be retried, and at least one each second."""

    # Maximum number of saved tokens.
    CAPACITY: Final = 10.0

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self.reset()

    def reset(self) -> None:
        """Begin without tokens."""
        self._tokens, self._last_free = 0.0, float("-inf")

    def earn(self, share: float) -> None:
        """Count a request."""
        with self._lock:
            self._tokens = min(self.CAPACITY, self._tokens + share)

    def spend(self) -> bool:
        """Take a token for a retry. Return False if none is left."""
        now = clock.monotonic()
        with self._lock:
            # A sum of shares such as 0.05 is a little less than one.
            if self._tokens > 1 - 1e-9:
                self._tokens = max(0.0, self._tokens - 1)
                return True
            if now - self._last_free >= 1:
                self._last_free = now
                return True
            return False


retry_limit: Final = RetryLimit()


@overload
def retry_404(function: Callable[P, R], *, is_miss: IsMiss | None = None) -> Callable[P, R]: ...
@overload
def retry_404(
    function: bool = True, *, is_miss: IsMiss | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def retry_404(function: Any = True, *, is_miss: IsMiss | None = None) -> Any:
    """
    Run a view once more on the primary if it ends in 404 after reading a replica, as
    ``PINNING_RETRY_404`` does for all of them. ``@retry_404(False)`` excludes a view.

    ``is_miss(response)`` returns whether another response counts as a 404, for example one of
    GraphQL with ``null``. A function that is no view, such as a task, is retried on
    ``DoesNotExist`` and ``Http404``, without a limit. What the function did besides reading is done
    twice.
    """
    if callable(function):
        return _decorate(function, is_miss)
    if function is False:
        return _exclude
    return functools.partial(_decorate, is_miss=is_miss)


def _decorate(function: Callable[..., Any], is_miss: IsMiss | None = None) -> Callable[..., Any]:
    if isinstance(function, type):
        raise TypeError(
            f"{function.__name__} is a class. Decorate one of its methods: "
            "@method_decorator(retry_404, name='dispatch')"
        )
    on_primary = Block(OverrideKind.RETRY_404)(function)

    if iscoroutinefunction(function):

        @functools.wraps(function)
        async def acall(*args: Any, **kwargs: Any) -> Any:
            again = functools.partial(on_primary, *args, **kwargs)
            return await _arun(_FirstRun(args, is_miss), function(*args, **kwargs), again)

        return acall

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first, again = _FirstRun(args, is_miss), functools.partial(on_primary, *args, **kwargs)
        with first:
            first.result = function(*args, **kwargs)
        if inspect.iscoroutine(first.result):
            # dispatch() of an async view is a plain function, for example.
            return _arun(first, first.result, again)
        if not first.is_stale:
            return first.result
        try:
            return first.finish(again())
        except Exception as error:
            return first.finish_with_error(error)

    return call


async def _arun(first: _FirstRun, awaitable: Awaitable[Any], again: Callable[[], Any]) -> Any:
    with first:
        first.result = await awaitable
    if not first.is_stale:
        return first.result
    try:
        return first.finish(await again())
    except Exception as error:
        return first.finish_with_error(error)


def _exclude(view: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(view)
    def call(*args: Any, **kwargs: Any) -> Any:
        current_scope().retry_404_disabled = True
        return view(*args, **kwargs)

    return markcoroutinefunction(call) if iscoroutinefunction(view) else call


class _FirstRun(AbstractContextManager[None]):
    """
    The run of a view or function that may have to be repeated: ``is_stale`` if it has found nothing
    on a replica. Its exception is suppressed then.
    """

    def __init__(self, args: tuple[Any, ...], is_miss: IsMiss | None) -> None:
        self._request, self._is_miss = _request_of(args), is_miss
        self._watch = Watch()
        self.result: Any = None
        self.is_stale = False
        self._error: BaseException | None = None

    def __enter__(self) -> None:
        self._scope = scope = current_scope()
        self._revision = scope.write_revision
        self._watch.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._watch.__exit__()
        if self._request is not None and not inspect.iscoroutine(self.result):
            retry_limit.earn(conf.retry_404 or RETRY_404_SHARE)
        if self._ended_in_miss(error) and self._has_read_replica and not self._has_written:
            self.is_stale = self._request is None or _may_retry(self._request, self._scope)
        if self.is_stale:
            self._error = error
        return self.is_stale

    def _ended_in_miss(self, error: BaseException | None) -> bool:
        if error is not None:
            return isinstance(error, MISSES)
        if self._request is None or getattr(self.result, "streaming", False):
            return False
        if getattr(self.result, "status_code", None) == 404:
            return True
        # Before a coroutine is awaited there is no response yet.
        has_result = self.result is not None and not inspect.iscoroutine(self.result)
        return self._is_miss is not None and has_result and bool(self._is_miss(self.result))

    @property
    def _has_written(self) -> bool:
        # A thread that has only the scope is not watched.
        return self._watch.has_written or self._scope.write_revision != self._revision

    @property
    def _has_read_replica(self) -> bool:
        return any(
            alias in conf.primary_by_replica and reason not in _EXPLICIT_REASONS
            for alias, reason in tuple(self._watch.routes)
        )

    def finish(self, result: Any) -> Any:
        """Count the second run by its result, and return that."""
        self._error, self.result = None, result
        counters.retries_404["missing" if self._ended_in_miss(None) else "found"] += 1
        return result

    def finish_with_error(self, error: Exception) -> Any:
        """
        Count the second run by its exception, and raise that. If the primary is unreachable, return
        the response of the first run, or raise its exception.
        """
        first, self._error = self._error, None
        if not isinstance(error, (OperationalError, InterfaceError)):
            counters.retries_404["missing" if isinstance(error, MISSES) else "found"] += 1
            raise error
        log_rate_limited(
            logger,
            logging.WARNING,
            "retry_404",
            "Could not retry a view on the primary; its first response is returned: %s",
            error,
        )
        if first is not None:
            raise first from None
        return self.result


def _request_of(args: tuple[Any, ...]) -> Any:
    """Return the request that a view was called with, as a function or as a method, or None."""
    for each in args[:2]:
        # The request of Django REST framework contains Django's.
        if isinstance(each, HttpRequest) or isinstance(
            getattr(each, "_request", None), HttpRequest
        ):
            return each
    return None


def _may_retry(request: Any, scope: Scope) -> bool:
    """Return whether a view may be retried now: once in a request, and within the limit."""
    if request.method not in RETRIED_METHODS or scope.retry_404_disabled:
        return False
    if not retry_limit.spend():
        counters.retries_404["refused"] += 1
        return False
    scope.retry_404_disabled = True
    return True
