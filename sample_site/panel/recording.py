"""Records the database of each statement of a request."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from secrets import token_urlsafe
from typing import Any, Literal

from django.db import connections
from django.http import HttpRequest

Kind = Literal["read", "write", "other"]

WRITES = ("INSERT", "UPDATE", "DELETE", "MERGE")
KEPT = 200


@dataclass(frozen=True)
class Query:
    """One statement and the database that ran it."""

    database: str
    sql: str
    milliseconds: float

    @property
    def kind(self) -> Kind:
        """The label on the page."""
        word = self.sql.lstrip("( \n").split(" ", 1)[0].upper()
        if word == "SELECT":
            return "read"
        return "write" if word in WRITES else "other"

    @property
    def short(self) -> str:
        """The abbreviated statement."""
        text = re.sub(r"^SELECT .*? FROM ", "SELECT … FROM ", self.sql.replace('"', ""))
        text = re.sub(r" (?:INNER|LEFT OUTER) JOIN (\w+) ON \([^()]*\)", r" + \1", text)
        text = re.sub(r"\((?:[a-z_]+, )+[a-z_]+\) VALUES \(.*\)", "…", text)
        text = re.sub(r"\bSET .* WHERE ", "SET … WHERE ", text)
        return text if len(text) <= 90 else f"{text[:89]}…"


@dataclass
class Recording:
    """The statements of one request, in order."""

    method: str
    path: str
    queries: list[Query] = field(default_factory=list)

    def execute(
        self, run: Callable[..., Any], sql: str, params: Any, many: bool, context: dict[str, Any]
    ) -> Any:
        """Run a statement and record it (an execute wrapper)."""
        started = time.perf_counter()
        try:
            return run(sql, params, many, context)
        finally:
            taken = (time.perf_counter() - started) * 1000
            # The cursor has the alias of the server, which may differ from the requested one.
            self.queries.append(Query(context["cursor"].db.alias, str(sql), taken))

    def watch_all(self) -> ExitStack:
        """Record the statements of this thread's connections inside the context manager."""
        with ExitStack() as stack:
            for connection in connections.all():
                stack.enter_context(connection.execute_wrapper(self.execute))
            return stack.pop_all()

    @property
    def read_from(self) -> list[str]:
        """The databases of the reads, each once."""
        return list(dict.fromkeys(q.database for q in self.queries if q.kind == "read"))

    @property
    def wrote(self) -> bool:
        """Whether anything was written."""
        return any(query.kind == "write" for query in self.queries)


def recorded(request: HttpRequest) -> Recording:
    """Return the recording of a request, which the panel's middleware has started."""
    recording = getattr(request, "recording", None)
    return recording if isinstance(recording, Recording) else Recording("", "")


class Kept:
    """Recordings of redirects, which the next page of the same browser shows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recordings: OrderedDict[str, Recording] = OrderedDict()

    def put(self, recording: Recording) -> str:
        """Store a recording, and return its key."""
        key = token_urlsafe(12)
        with self._lock:
            self._recordings[key] = recording
            while len(self._recordings) > KEPT:
                self._recordings.popitem(last=False)
        return key

    def take(self, key: str) -> Recording | None:
        """Return and remove a recording."""
        with self._lock:
            return self._recordings.pop(key, None)
