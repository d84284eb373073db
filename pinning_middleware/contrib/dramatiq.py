"""
dramatiq: a message that is sent after a write reads that write.

One call, where the broker is made, for those who send and for the workers::

    broker = RedisBroker(url=...)
    propagate_pins(broker)
    dramatiq.set_broker(broker)

The pins travel in the message's options. In the worker each message is a scope that begins with
them; its retries, the next stage of a pipeline and the callbacks of a group begin with what it has
left behind.
"""

from __future__ import annotations

import threading
from typing import Any

from dramatiq import Broker, Middleware

from pinning_middleware import tokens
from pinning_middleware.pins import merge_pins
from pinning_middleware.routing.outgoing import outgoing_pins, pin_of_now
from pinning_middleware.routing.pools import pools
from pinning_middleware.scope_blocks import PinningScope
from pinning_middleware.scopes.scope import Scope, entered_scope

__all__ = ["OPTION", "PropagatePins", "propagate_pins"]

OPTION = "pinning_token"


def propagate_pins(broker: Broker) -> None:
    """
    Let the messages of this broker carry pins. The middleware goes before all others, so that what
    they send when a message is done (retries, pipelines, callbacks) is still part of its scope.
    """
    broker.add_middleware(PropagatePins())
    broker.middleware.insert(0, broker.middleware.pop())


class PropagatePins(Middleware):
    """Opens a scope for each message that is processed, and gives each that is sent its pins."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def before_enqueue(self, broker: Broker, message: Any, delay: int | None) -> None:
        scope = entered_scope()
        pins = outgoing_pins(scope) if scope is not None else {}
        if self._ends_group(message):
            # Its parts are done, each in a scope of its own.
            now = {pool.primary: pin_of_now(pool) for pool in pools().by_primary.values()}
            pins = merge_pins(pins, now)
        # Without any, a token stays: workers enqueue a delayed message again when its time comes.
        if pins:
            message.options[OPTION] = tokens.dumps(pins)

    def _ends_group(self, message: Any) -> bool:
        running = getattr(self._thread, "message", None)
        callbacks = running.options.get("group_completion_callbacks") if running else ()
        return any(callback["message_id"] == message.message_id for callback in callbacks or ())

    def before_process_message(self, broker: Broker, message: Any) -> None:
        token = message.options.get(OPTION)
        scope = Scope.of(tokens.accept(token) if token else {})
        self._thread.message, self._thread.block = message, PinningScope(scope=scope, isolated=True)
        self._thread.block.__enter__()

    def after_process_message(
        self, broker: Broker, message: Any, *, result: Any = None, exception: Any = None
    ) -> None:
        block, self._thread.block, self._thread.message = self._thread.block, None, None
        block.__exit__(None, None, None)

    def after_skip_message(self, broker: Broker, message: Any) -> None:
        self.after_process_message(broker, message)
