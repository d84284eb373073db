"""
Celery: a task that is sent after a write reads that write.

The pins travel in the message's headers. In the worker each task is a scope that begins with them
and ends with the task; retries, chains and chords send on what it leaves behind.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

from celery import Celery, current_task
from celery.signals import before_task_publish, task_postrun, task_prerun
from django.core import checks

from pinning_middleware import tokens
from pinning_middleware.pins import Pins, merge_pins
from pinning_middleware.routing.outgoing import outgoing_pins, pin_of_now
from pinning_middleware.routing.pools import pools
from pinning_middleware.scope_blocks import PinningScope
from pinning_middleware.scopes.scope import Scope, entered_scope

__all__ = ["HEADER", "POLICIES", "propagate_pins"]

HEADER = "pinning_token"
POLICIES = ("sticky", "primary", "wait")
# Seconds that a task with pinning="wait" waits unless it says pinning_wait.
LONGEST_WAIT = 1.0

logger = logging.getLogger("pinning_middleware")


def propagate_pins(app: Celery) -> None:
    """
    Let the tasks of this app carry pins. A task says what it needs by ``@app.task(pinning=…)``:

    - ``"sticky"``, the default: reads from a replica that has caught up, else from the primary;
    - ``"primary"``: reads from the primary;
    - ``"wait"``: waits for a replica to catch up, at most ``pinning_wait`` seconds (1), and reads
      from the primary if none has.

    A task with another policy reads from the primary; it is an error of ``manage.py check``, and
    of the log of whoever finalizes the app, a worker say.
    """
    before_task_publish.connect(_send, weak=False, dispatch_uid="pinning_middleware.send")
    task_prerun.connect(_begin, weak=False, dispatch_uid="pinning_middleware.begin")
    task_postrun.connect(_end, weak=False, dispatch_uid="pinning_middleware.end")
    app.on_after_finalize.connect(_complain, weak=False)
    checks.register(functools.partial(_check, app))


def _mistakes(app: Celery) -> Iterator[str]:
    known = ", ".join(map(repr, POLICIES))
    for name, task in app.tasks.items():
        policy = getattr(task, "pinning", "sticky")
        if policy not in POLICIES:
            yield f"Task {name}: pinning must be one of {known}, not {policy!r}."


def _complain(sender: Celery, **kwargs: Any) -> None:
    # Celery's signals swallow what their receivers raise.
    for mistake in _mistakes(sender):
        logger.error(mistake)


def _check(app: Celery, **kwargs: Any) -> list[checks.CheckMessage]:
    return [
        checks.Error(mistake, hint="It reads from the primary.", id="pinning_middleware.E101")
        for mistake in _mistakes(app)
    ]


def _send(headers: dict[str, Any], **kwargs: Any) -> None:
    scope = entered_scope()
    pins = outgoing_pins(scope) if scope is not None else {}
    if _ends_group():
        pins = merge_pins(pins, _pins_of_group())
    if pins:
        headers[HEADER] = tokens.dumps(pins)
    else:
        headers.pop(HEADER, None)


def _ends_group() -> bool:
    if not current_task:
        return False
    return bool(current_task.request.chord) or current_task.name == "celery.chord_unlock"


def _pins_of_group() -> Pins:
    """Return pins of all that the parts of a chord wrote: they are done, each in its own scope."""
    request = current_task.request
    pins: Pins | None = request.__dict__.get("pinning_of_group")
    if pins is None:
        # Once for all messages that this run sends.
        pins = {pool.primary: pin_of_now(pool) for pool in pools().by_primary.values()}
        request.pinning_of_group = pins
    return pins


def _begin(task: Any, **kwargs: Any) -> None:
    request = task.request
    token = getattr(request, HEADER, None)
    scope = Scope.of(tokens.accept(token) if token else {})
    policy = getattr(task, "pinning", "sticky")
    if policy not in ("sticky", "wait"):
        scope.read_primary()
    elif policy == "wait":
        scope.wait = getattr(task, "pinning_wait", LONGEST_WAIT)
    # An eager task is part of who called it; a worker serves strangers by turns.
    block = PinningScope(scope=scope, isolated=not request.is_eager)
    block.__enter__()
    # Of this run: a task's id is that of its retries too, and of a message that came twice.
    request.pinning_scope = block


def _end(task: Any, **kwargs: Any) -> None:
    block: PinningScope | None = task.request.__dict__.pop("pinning_scope", None)
    if block is not None:
        block.__exit__(None, None, None)
