"""
dramatiq: a message that is sent after a write reads that write.

Call ``propagate_pins`` where the broker is created, for senders and workers::

    broker = RedisBroker(url=...)
    propagate_pins(broker)
    dramatiq.set_broker(broker)

The pins travel in the message's options. In the worker, each message runs in a scope that begins
with these pins. Its retries, the next stage of a pipeline and the callbacks of a group inherit its
outgoing pins.
"""

from __future__ import annotations

import threading
from typing import Any

from dramatiq import Broker, Middleware

from pinning_middleware import handoff

__all__ = ["OPTION", "PropagatePins", "propagate_pins"]

OPTION = "pinning_token"


def propagate_pins(broker: Broker) -> None:
    """
    Propagate pins to the messages of this broker.

    The middleware comes before all others, so that the messages that they send after a message
    (retries, pipelines, callbacks) still belong to its scope.
    """
    broker.add_middleware(PropagatePins())
    broker.middleware.insert(0, broker.middleware.pop())


class PropagatePins(Middleware):
    """Adds pins to messages that are sent, and opens a scope for each that is processed."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def before_enqueue(self, broker: Broker, message: Any, delay: int | None) -> None:
        others = [handoff.pins_of_all_writes()] if self._is_group_callback(message) else []
        token = handoff.token_to_send(*others)
        # Keep an existing token: workers enqueue a delayed message again when it is due.
        if token is not None:
            message.options[OPTION] = token

    def _is_group_callback(self, message: Any) -> bool:
        running = getattr(self._thread, "message", None)
        callbacks = running.options.get("group_completion_callbacks") if running else ()
        return any(callback["message_id"] == message.message_id for callback in callbacks or ())

    def before_process_message(self, broker: Broker, message: Any) -> None:
        pins = handoff.pins_of_tokens(message.options.get(OPTION))
        self._thread.message = message
        self._thread.block = handoff.task_scope(pins, isolated=True)
        self._thread.block.__enter__()

    def after_process_message(
        self, broker: Broker, message: Any, *, result: Any = None, exception: Any = None
    ) -> None:
        block, self._thread.block, self._thread.message = self._thread.block, None, None
        block.__exit__(None, None, None)

    def after_skip_message(self, broker: Broker, message: Any) -> None:
        self.after_process_message(broker, message)
