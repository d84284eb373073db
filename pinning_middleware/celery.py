"""
Celery: a task that is sent after a write reads that write.

The pins travel in the headers of the message. In the worker, each task runs in a scope that begins
with these pins. Retries, chains and chords inherit the pins of the tasks before them. A task of
celery-batches begins with the pins of all of its messages.

celery-singleton sends no message if the same task is already waiting. The pins of such a call are
kept in ``PINNING_CACHE`` for the waiting task, so the workers must share that cache.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

from celery import Celery, Task, current_task
from celery.exceptions import Retry
from celery.signals import before_task_publish, task_postrun, task_prerun
from django.core import checks

from pinning_middleware import handoff
from pinning_middleware.checks.messages import TAG
from pinning_middleware.pins import Pins, merge_pins
from pinning_middleware.scope_blocks import PinningScope
from pinning_middleware.utils import counters

__all__ = ["HEADER", "POLICIES", "propagate_pins"]

HEADER = "pinning_token"
POLICIES = ("sticky", "primary", "wait", "retry")
# How often a task with pinning="retry" has been requeued; in the headers of its message.
REQUEUED = "pinning_requeued"
DEFAULT_RETRIES = 3
# Delay before a task that was requeued runs again, doubled each time (seconds).
FIRST_DELAY = 1.0
# Maximum wait of a task with pinning="wait" and without pinning_wait (seconds).
DEFAULT_WAIT = 1.0

logger = logging.getLogger("pinning_middleware")


def propagate_pins(app: Celery) -> None:
    """
    Propagate pins to the tasks of this app.

    A task chooses its policy with ``@app.task(pinning=…)``:

    - ``"sticky"``, the default: read from a replica that has caught up, else from the primary;
    - ``"primary"``: read from the primary;
    - ``"wait"``: wait for a replica to catch up, at most ``pinning_wait`` seconds (default: 1),
      else read from the primary;
    - ``"retry"``: if no replica has caught up within ``pinning_wait`` seconds (default: 0), put the
      task back before it runs, with a countdown of 1, 2, 4 … seconds, at most ``pinning_retries``
      times (default: 3), then read from the primary. These retries are not the task's own.

    A task class that overrides ``before_start()`` must call ``super()`` for ``"retry"``. An eager
    task is not requeued.

    A task with other values reads from the primary. ``manage.py check`` reports it as an error,
    and it is logged when the app is finalized, for example in a worker.
    """
    before_task_publish.connect(_add_token, weak=False, dispatch_uid="pinning_middleware.send")
    task_prerun.connect(_open_scope, weak=False, dispatch_uid="pinning_middleware.begin")
    task_postrun.connect(_close_scope, weak=False, dispatch_uid="pinning_middleware.end")
    app.on_after_finalize.connect(_log_invalid_policies, weak=False)
    checks.register(functools.partial(_check_policies, app), TAG)
    _requeue_before_start()
    _keep_pins_of_duplicates()


# Policies


def _invalid_policies(app: Celery) -> Iterator[str]:
    for name, task in app.tasks.items():
        for problem in _problems(task):
            yield f"Task {name}: {problem}."


def _problems(task: Any) -> Iterator[str]:
    """Yield what is wrong with the options of a task."""
    if (policy := getattr(task, "pinning", "sticky")) not in POLICIES:
        yield f"pinning must be one of {', '.join(map(repr, POLICIES))}, not {policy!r}"
    if not _is_number(retries := getattr(task, "pinning_retries", DEFAULT_RETRIES), int):
        yield f"pinning_retries must be an integer, 0 or more, not {retries!r}"
    if not _is_number(wait := getattr(task, "pinning_wait", None) or 0, int, float):
        yield f"pinning_wait must be a number of seconds, not {wait!r}"


def _is_number(value: object, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool) and value >= 0  # type: ignore[operator]


def _log_invalid_policies(sender: Celery, **kwargs: Any) -> None:
    # Celery suppresses exceptions of signal receivers, so log instead of raising.
    for message in _invalid_policies(sender):
        logger.error(message)


def _check_policies(app: Celery, **kwargs: Any) -> list[checks.CheckMessage]:
    hint = (
        f"Set pinning to one of {', '.join(map(repr, POLICIES))}, pinning_retries and pinning_wait "
        "to a number. The task reads from the primary."
    )
    return [
        checks.Error(message, hint=hint, id="pinning_middleware.E101")
        for message in _invalid_policies(app)
    ]


# Messages


def _add_token(sender: object, headers: dict[str, Any], **kwargs: Any) -> None:
    others = [_pins_of_chord()] if _may_be_chord_body(sender) else []
    token = handoff.token_to_send(*others)
    if token is not None:
        headers[HEADER] = token
    else:
        headers.pop(HEADER, None)


def _may_be_chord_body(name: object) -> bool:
    """
    Return whether a message may belong to the body of a chord whose header has finished.

    IDs cannot be compared, because the tasks of a group have none in the body's signature.
    """
    if not current_task:
        return False
    request = current_task.request
    body = request.chord
    if current_task.name == "celery.chord_unlock":
        # Result backends without native chords poll for the end of the header.
        body = request.args[1] if len(request.args or ()) > 1 else request.kwargs.get("callback")
    return bool(body) and any(isinstance(each, str) and each == name for each in _task_names(body))


def _pins_of_chord() -> Pins:
    """Return pins of all that the header of a chord wrote, queried once for all of its body."""
    request = current_task.request
    pins: Pins | None = request.__dict__.get("pinning_of_chord")
    if pins is None:
        pins = request.pinning_of_chord = handoff.pins_of_all_writes()
    return pins


def _task_names(signature: Any) -> Iterator[object]:
    """Yield the names of all tasks of a signature, including nested ones and callbacks."""
    if isinstance(signature, dict):
        yield signature.get("task")
        for part in signature.values():
            yield from _task_names(part)
    elif isinstance(signature, (list, tuple)):
        for part in signature:
            yield from _task_names(part)


# Tasks


def _open_scope(task: Any, args: Any = (), **kwargs: Any) -> None:
    request = task.request
    pins = handoff.pins_of_tokens(getattr(request, HEADER, None), *_batch_tokens(args))
    if hasattr(task, "on_duplicate") and request.id:
        pins = merge_pins(pins, handoff.load_pins(request.id))
    policy = "primary" if any(_problems(task)) else getattr(task, "pinning", "sticky")
    scope = handoff.task_scope(
        pins,
        # An eager task runs inside the caller's scope; a worker processes unrelated tasks.
        isolated=not request.is_eager,
        wait=_seconds_to_wait(task, policy),
        prefer_primary=policy == "primary",
    )
    scope.__enter__()
    # Stored in the request, because the ID of a task is also that of its retries.
    request.pinning_scope = scope


def _seconds_to_wait(task: Any, policy: object) -> float | None:
    if policy not in ("wait", "retry"):
        return None
    return getattr(task, "pinning_wait", DEFAULT_WAIT if policy == "wait" else 0.0)


def _requeue_before_start() -> None:
    """Extend ``Task.before_start()``, which may raise ``Retry``, unlike receivers of signals."""
    original = Task.before_start
    if hasattr(original, "pinning_original"):
        return

    @functools.wraps(original)
    def before_start(self: Any, task_id: str, args: Any, kwargs: Any) -> None:
        if getattr(self, "pinning", None) == "retry" and not self.request.is_eager:
            _requeue_unless_caught_up(self, args, kwargs)
        original(self, task_id, args, kwargs)

    # Celery calls the hook of its base class only if it comes from elsewhere.
    before_start.__module__ = __name__
    before_start.pinning_original = original  # type: ignore[attr-defined]
    Task.before_start = before_start


def _requeue_unless_caught_up(task: Any, args: Any, kwargs: Any) -> None:
    if handoff.has_caught_up():
        return
    number = getattr(task.request, REQUEUED, None) or 0
    if number >= getattr(task, "pinning_retries", DEFAULT_RETRIES):
        counters.task_retries["primary"] += 1
        return
    if hasattr(task, "on_duplicate") and hasattr(task, "release_lock"):
        # celery-singleton sends no message while the lock is held, also by the task itself.
        task.release_lock(task_args=args, task_kwargs=kwargs)
    delay = FIRST_DELAY * 2**number
    signature = task.signature_from_request(task.request, args, kwargs, countdown=delay)
    signature.apply_async(headers={**(task.request.headers or {}), REQUEUED: number + 1})
    counters.task_retries["requeued"] += 1
    raise Retry("No replica has caught up.", when=delay, sig=signature)


def _close_scope(task: Any, **kwargs: Any) -> None:
    scope: PinningScope | None = task.request.__dict__.pop("pinning_scope", None)
    if scope is not None:
        scope.__exit__(None, None, None)


def _batch_tokens(args: Any) -> Iterator[object]:
    """Yield the tokens of the messages of a batch (celery-batches)."""
    requests = args[0] if args and isinstance(args[0], list) else ()
    for request in requests:
        if isinstance(headers := getattr(request, "request_dict", None), dict):
            yield headers.get(HEADER)


def _keep_pins_of_duplicates() -> None:
    """Keep the pins of calls that celery-singleton drops in favour of a waiting task."""
    try:
        from celery_singleton import Singleton
    except ImportError:
        return
    original = Singleton.on_duplicate
    if hasattr(original, "pinning_original"):
        return

    @functools.wraps(original)
    def on_duplicate(self: Any, existing_task_id: str, *args: Any, **kwargs: Any) -> Any:
        handoff.save_pins_to_send(existing_task_id)
        return original(self, existing_task_id, *args, **kwargs)

    on_duplicate.pinning_original = original  # type: ignore[attr-defined]
    Singleton.on_duplicate = on_duplicate
