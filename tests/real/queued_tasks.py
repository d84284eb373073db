"""Tasks, imported when all apps are ready because a task looks up its backend."""

from __future__ import annotations

import importlib.util
from typing import Any

from tests.real.worker import look

PACKAGE = "django.tasks" if importlib.util.find_spec("django.tasks") else "django_tasks"


@importlib.import_module(PACKAGE).task
def see(title: str) -> dict[str, Any]:
    return look(title)
