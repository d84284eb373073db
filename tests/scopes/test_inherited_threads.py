"""Threads that begin with a copy of their starter's context, as on free-threaded builds."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pinning_middleware import pinning_scope, use_primary
from pinning_middleware.scopes import overrides, scope, threads
from pinning_middleware.scopes.scope import Scope, entered_scope

HAS_OPTION = sys.version_info >= (3, 14)


class InheritingThread(threading.Thread):
    """A thread of Python 3.14 with ``-X thread_inherit_context=1``, on any version."""

    _context: contextvars.Context

    def start(self) -> None:
        self._context = contextvars.copy_context()
        super().start()

    def run(self) -> None:
        if HAS_OPTION:
            super().run()
        else:
            self._context.run(super().run)


@pytest.fixture
def in_thread(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    monkeypatch.setattr(scope, "_get", threads.clearing(scope._get))
    cleared = threads.clearing(overrides.current_overrides)
    monkeypatch.setattr(overrides, "current_overrides", cleared)

    def run(function: Callable[[], Any]) -> Any:
        found: list[Any] = []
        thread = InheritingThread(target=lambda: found.append(function()))
        thread.start()
        thread.join(30)
        return found[0]

    return run


Run = Callable[[Callable[[], Any]], Any]


def test_inheriting_thread_begins_outside_the_scope_and_its_overrides(in_thread: Run) -> None:
    with pinning_scope(), use_primary():
        found = in_thread(lambda: (overrides.current_overrides(), entered_scope()))
        assert found == (None, None)
        assert entered_scope() is not None
        assert overrides.current_overrides() is not None


def test_inheriting_thread_keeps_a_scope_that_it_enters_itself(in_thread: Run) -> None:
    def work() -> bool:
        with pinning_scope(isolated=True) as own:
            return entered_scope() is own._scope

    with pinning_scope():
        assert in_thread(work)


def test_function_run_in_the_callers_context_keeps_its_scope(in_thread: Run) -> None:
    """As sync_to_async() and asyncio.to_thread() do, also in a thread that is in no scope."""
    with pinning_scope() as outer:
        context = contextvars.copy_context()

        def work() -> list[Scope | None]:
            return [context.run(entered_scope), entered_scope(), context.run(entered_scope)]

        assert in_thread(work) == [outer._scope, None, outer._scope]


@pytest.mark.skipif(not HAS_OPTION, reason="needs Python 3.14")
def test_threads_pass_their_tests_with_thread_inherit_context() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-X", "thread_inherit_context=1", "-m", "pytest"]
    command += ["-q", "-p", "no:cacheprovider", "tests/test_threads.py", "tests/test_scopes.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
