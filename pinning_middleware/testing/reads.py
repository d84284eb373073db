"""Context managers that record, assert or forbid reads by role."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final, NamedTuple

import asgiref
import django
from django.apps import apps

import pinning_middleware
from pinning_middleware.conf import conf
from pinning_middleware.utils import counters

PRIMARY: Final = "primary"
REPLICA: Final = "replica"
_ROLES: Final = (PRIMARY, REPLICA)


class PrimaryForbidden(AssertionError):
    """Raised if the primary is used inside ``forbid_primary()``."""


class ReplicaForbidden(AssertionError):
    """Raised if a replica is read inside ``forbid_replicas()``."""


class Read(NamedTuple):
    """
    One completed read.

    - ``alias``: the alias chosen by the routing decision, even if it is a test mirror.
    - ``role``: ``"primary"`` or ``"replica"``.
    - ``reason``: a ``pinning_middleware.reasons.Reason``.
    - ``model``: the model of the first table, or ``None``.
    - ``sql``: the statement.
    - ``served``: the alias whose connection ran it.
    - ``place``: the line of the site's code (``file:line``).
    """

    alias: str
    role: str
    reason: str
    model: Any
    sql: str
    served: str
    place: str

    def __str__(self) -> str:
        model = "" if self.model is None else f" of {self.model._meta.label}"
        return f"{self.alias} ({self.reason}){model} at {self.place}: {self.sql[:120]}"


# Recording


@contextmanager
def capture_reads() -> Iterator[list[Read]]:
    """
    Record the reads of all threads of this process::

        with capture_reads() as reads:
            client.get("/")
        assert [read.role for read in reads] == ["replica"]
    """
    reads: list[Read] = []
    with observe_reads(lambda read: reads.append(_describe(read))):
        yield reads


@contextmanager
def observe_reads(observe: Callable[[counters.Read], None]) -> Iterator[None]:
    """Call ``observe`` with each read inside the context."""
    counters.observers.append(observe)
    try:
        yield
    finally:
        _remove(counters.observers, observe)


def _remove(things: list[Any], thing: Any) -> None:
    # Compare by identity, because distinct observers may be equal.
    for index, each in enumerate(things):
        if each is thing:
            del things[index]
            return


def _describe(read: counters.Read) -> Read:
    tables = tables_of(read.sql)
    model = _models().get(tables[0]) if tables else None
    return Read(read.alias, read.role, read.reason, model, read.sql, read.served, calling_line())


def _models() -> dict[str, Any]:
    models = apps.get_models(include_auto_created=True)
    return {model._meta.db_table.lower(): model for model in models if not model._meta.proxy}


_NAME = r'(?:"[^"]+"|`[^`]+`|\[[^\]]+\]|[\w$]+)'
_TABLE = rf"(?:ONLY\s+)?{_NAME}(?:\s*\.\s*{_NAME})*"
# Tables in a list may have aliases.
_SOURCES = re.compile(
    rf"\b(?:FROM|JOIN)\s+({_TABLE}(?:(?:\s+(?:AS\s+)?{_NAME})?\s*,\s*{_TABLE})*)", re.IGNORECASE
)
_FIRST_TABLE = re.compile(rf"\s*(?:ONLY\s+)?({_NAME}(?:\s*\.\s*{_NAME})*)", re.IGNORECASE)
# String literals and comments, except comments that MySQL executes.
_LITERALS = re.compile(r"'(?:[^']|'')*'|--[^\n]*|/\*(?!M?!).*?\*/", re.DOTALL)


def tables_of(sql: str) -> list[str]:
    """Return the tables that a statement reads, unquoted, without schema, in lower case."""
    lists = _SOURCES.findall(_LITERALS.sub(" ", sql))
    names = [re.match(_FIRST_TABLE, name) for each in lists for name in each.split(",")]
    return [re.split(r"\s*\.\s*", name[1])[-1].strip('"`[]').lower() for name in names if name]


def mentions_table(sql: str, table: str) -> bool:
    """Return whether the name of a table (in lower case) occurs in a statement."""
    word = rf"(?<![\w$]){re.escape(table)}(?![\w$])"
    return re.search(word, _LITERALS.sub(" ", sql).lower()) is not None


# Lines of the site's code

_LIBRARIES: Final = tuple(
    os.path.dirname(os.path.abspath(str(module.__file__))) + os.sep
    for module in (django, asgiref, pinning_middleware)
) + tuple(path + os.sep for name in ("stdlib", "platstdlib") if (path := sysconfig.get_path(name)))


@lru_cache(maxsize=4096)
def _is_site_code(file: str) -> bool:
    return "site-packages" not in file and not file.startswith((*_LIBRARIES, "<"))


def calling_line() -> str:
    """
    Return the innermost line of the site's own code on the stack, as ``file:line``.

    In a thread of ``sync_to_async`` the awaiting line is not on the stack. Then return the
    innermost line of any code outside this package.
    """
    frame: Any = sys._getframe(1)
    first = ""
    while frame is not None:
        file = frame.f_code.co_filename
        where = f"{file}:{frame.f_lineno}"
        if _is_site_code(file):
            return where
        if not first and not file.startswith(_LIBRARIES[2]):
            first = where
        frame = frame.f_back
    return first


# Asserting


@contextmanager
def assert_reads_from(where: str, reason: str | None = None) -> Iterator[list[Read]]:
    """
    Assert that there are reads, and that each goes to ``where``, for ``reason`` if given.

    ``where`` is ``"replica"``, ``"primary"`` or an alias. Yield the list of reads. Raise ValueError
    if ``where`` is neither a role nor an alias of a pool.
    """
    _check(where)
    with capture_reads() as reads:
        yield reads
    if not reads:
        raise AssertionError(f"No reads, expected reads from {where}.")
    wrong = [
        read
        for read in reads
        if where not in (read.alias, read.role) or reason not in (None, read.reason)
    ]
    if wrong:
        expected = where if reason is None else f"{where} for the reason {reason!r}"
        raise AssertionError(
            f"{len(wrong)} of {len(reads)} reads did not go to {expected}:{_format(wrong)}"
        )


@contextmanager
def assert_num_reads(
    primary: int | None = None, replica: int | None = None
) -> Iterator[list[Read]]:
    """Assert the number of reads by role; None means any number."""
    with capture_reads() as reads:
        yield reads
    counts = Counter(read.role for read in reads)
    for role, expected in ((PRIMARY, primary), (REPLICA, replica)):
        if expected is not None and counts[role] != expected:
            matching = [read for read in reads if read.role == role]
            raise AssertionError(
                f"{counts[role]} reads from the {role}, {expected} expected:{_format(matching)}"
            )


def _format(reads: list[Read]) -> str:
    return "".join(f"\n  {read}" for read in reads) or " none"


def _check(where: str) -> None:
    choices = {*_ROLES, *conf.pools_by_primary, *conf.primary_by_replica}
    if where not in choices:
        raise ValueError(f"{where!r} is not one of {', '.join(sorted(choices))}")


# Forbidding


class Violations(list[AssertionError]):
    """Violations of a context manager: raised at once, and again at its end if caught."""

    def add(self, error: AssertionError) -> None:
        self.append(error)
        raise error

    def check(self) -> None:
        """Raise the first violation, in case the code has caught it."""
        if self:
            raise self[0]


@contextmanager
def forbid_primary(reads: bool = True) -> Iterator[None]:
    """
    Forbid writes and, unless ``reads`` is false, reads from the primary.

    Each raises PrimaryForbidden at its line, and again at the end of the context if the code has
    caught that.
    """
    violations = Violations()

    def read(read: counters.Read) -> None:
        if reads and read.role == PRIMARY:
            violations.add(PrimaryForbidden(f"A read from the primary: {_describe(read)}"))

    def write(alias: str, sql: str) -> None:
        violations.add(PrimaryForbidden(f"A write to {alias} at {calling_line()}: {sql[:120]}"))

    with observe_writes(write), observe_reads(read):
        yield
    violations.check()


@contextmanager
def observe_writes(observe: Callable[[str, str], None]) -> Iterator[None]:
    """Call ``observe`` with the alias and SQL of each write, before it runs."""
    counters.write_observers.append(observe)
    try:
        yield
    finally:
        _remove(counters.write_observers, observe)


@contextmanager
def forbid_replicas() -> Iterator[None]:
    """
    Forbid reads from replicas.

    Each raises ReplicaForbidden at its line, and again at the end of the context if the code has
    caught that.
    """
    violations = Violations()

    def read(read: counters.Read) -> None:
        if read.role == REPLICA:
            violations.add(ReplicaForbidden(f"A read from a replica: {_describe(read)}"))

    with observe_reads(read):
        yield
    violations.check()
