"""Parts of a response that run after its view: closing it, and rendering a template response."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from weakref import WeakSet

from django.http.response import HttpResponseBase

_wrapped_classes: WeakSet[type[Any]] = WeakSet()


def render_within(response: Any, context: AbstractContextManager[object]) -> None:
    """Render a template response inside a context. A later context encloses the earlier ones."""
    inner = response.__dict__.get("pinning_render_contexts", ())
    response.pinning_render_contexts = (*inner, context)


def render_in_context(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``SimpleTemplateResponse.render``."""

    def render(self: Any) -> Any:
        # A rendered response may be pickled by a cache.
        contexts = self.__dict__.pop("pinning_render_contexts", ())
        with ExitStack() as stack:
            for context in reversed(contexts):
                stack.enter_context(context)
            return original(self)

    return render


def close_within(response: HttpResponseBase, context: AbstractContextManager[object]) -> None:
    """
    Have a response closed inside a context: its closers, receivers of ``request_finished``, and a
    ``close()`` that its class overrides. The context is entered once.
    """
    kind = type(response)
    if kind not in _wrapped_classes:
        # A class may override close(), and call the overridden one first.
        for base in kind.__mro__:
            if issubclass(base, HttpResponseBase) and "close" in vars(base):
                _wrap_close(base)
        _wrapped_classes.add(kind)
    response.pinning_close_context = context  # type: ignore[attr-defined]


def _wrap_close(owner: type[Any]) -> None:
    original = vars(owner)["close"]
    if hasattr(original, "pinning_original"):
        return

    @functools.wraps(original)
    def close(self: Any) -> Any:
        context = self.__dict__.pop("pinning_close_context", None)
        if context is None:
            return original(self)
        with context:
            return original(self)

    close.pinning_original = original  # type: ignore[attr-defined]
    owner.close = close
