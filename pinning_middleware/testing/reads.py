"""Where reads go: blocks that record it, assert it, or forbid it."""

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

__all__ = [
    "PRIMARY",
    "REPLICA",
    "PrimaryForbidden",
    "Read",
    "ReplicaForbidden",
    "assert_num_reads",
    "assert_reads_from",
    "capture_reads",
    "forbid_primary",
    "forbid_replicas",
    "here",
    "names",
    "tables_of",
]

PRIMARY: Final = "primary"
REPLICA: Final = "replica"
_ROLES: Final = (PRIMARY, REPLICA)


class PrimaryForbidden(AssertionError):
    """The primary was used inside ``forbid_primary()``."""


class ReplicaForbidden(AssertionError):
    """A replica was read inside ``forbid_replicas()``."""


class Read(NamedTuple):
    """
    One read: ``alias``, where it was meant to go, also where a test mirror leads to the primary;
    ``role``, ``"primary"`` or ``"replica"``; ``reason``, a word of
    ``pinning_middleware.reasons``, or ``"explicit"`` where the code named the alias; ``model``,
    the one of the table that it selects from, ``None`` where there is none; ``sql``; ``served``,
    the alias that answered; ``place``, the site's line that made it (``file:line``).
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
    Record every read of a pool that this process makes inside the block, in whichever thread::

        with capture_reads() as reads:
            client.get("/")
        assert [read.role for read in reads] == ["replica"]
    """
    found: list[Read] = []
    with observed(lambda read: found.append(_told(read))):
        yield found


@contextmanager
def observed(observe: Callable[[counters.Read], None]) -> Iterator[None]:
    """Call this with each read inside the block."""
    counters.observers.append(observe)
    try:
        yield
    finally:
        _take_out(counters.observers, observe)


def _take_out(things: list[Any], thing: Any) -> None:
    # By identity: two that are equal need not be the same.
    for place, each in enumerate(things):
        if each is thing:
            del things[place]
            return


def _told(read: counters.Read) -> Read:
    tables = tables_of(read.sql)
    model = _models().get(tables[0]) if tables else None
    return Read(read.alias, read.role, read.reason, model, read.sql, read.served, here())


def _models() -> dict[str, Any]:
    models = apps.get_models(include_auto_created=True)
    return {model._meta.db_table.lower(): model for model in models if not model._meta.proxy}


_NAME = r'(?:"[^"]+"|`[^`]+`|\[[^\]]+\]|[\w$]+)'
_SOURCES = re.compile(
    rf"\b(?:FROM|JOIN)\s+(?:ONLY\s+)?({_NAME}(?:\s*\.\s*{_NAME})*)", re.IGNORECASE
)
# Texts and comments, where no table stands; but for comments that MySQL runs.
_ASIDE = re.compile(r"'(?:[^']|'')*'|--[^\n]*|/\*(?!M?!).*?\*/", re.DOTALL)


def tables_of(sql: str) -> list[str]:
    """Return the tables that a statement reads, without schema and quotes, in lower case."""
    sources = _SOURCES.findall(_ASIDE.sub(" ", sql))
    return [re.split(r"\s*\.\s*", name)[-1].strip('"`[]').lower() for name in sources]


def names(sql: str, table: str) -> bool:
    """Return whether a statement has the name of this table (in lower case) anywhere."""
    word = rf"(?<![\w$]){re.escape(table)}(?![\w$])"
    return re.search(word, _ASIDE.sub(" ", sql).lower()) is not None


# Where in the site's code

_NOT_THE_SITE: Final = tuple(
    os.path.dirname(os.path.abspath(str(module.__file__))) + os.sep
    for module in (django, asgiref, pinning_middleware)
) + tuple(path + os.sep for name in ("stdlib", "platstdlib") if (path := sysconfig.get_path(name)))


@lru_cache(maxsize=4096)
def _is_of_site(file: str) -> bool:
    return "site-packages" not in file and not file.startswith((*_NOT_THE_SITE, "<"))


def here() -> str:
    """
    Return the innermost line of the site's own code that is running, as ``file:line``. In a
    thread of ``sync_to_async`` the line that awaits is not to be seen: there it is the
    innermost line of any code.
    """
    frame: Any = sys._getframe(1)
    first = ""
    while frame is not None:
        file = frame.f_code.co_filename
        where = f"{file}:{frame.f_lineno}"
        if _is_of_site(file):
            return where
        if not first and not file.startswith(_NOT_THE_SITE[2]):
            first = where
        frame = frame.f_back
    return first


# Asserting


@contextmanager
def assert_reads_from(where: str, reason: str | None = None) -> Iterator[list[Read]]:
    """
    Assert that there are reads inside the block and that each goes to ``"replica"``,
    ``"primary"`` or this alias, and for this reason where one is given. Yields the reads.

    ``ValueError`` for what is neither a role nor an alias of a pool.
    """
    _check(where)
    with capture_reads() as reads:
        yield reads
    if not reads:
        raise AssertionError(f"There was no read at all, from {where} or elsewhere.")
    wrong = [
        read
        for read in reads
        if where not in (read.alias, read.role) or reason not in (None, read.reason)
    ]
    if wrong:
        because = "" if reason is None else f" by the reason {reason!r}"
        raise AssertionError(
            f"{len(wrong)} of {len(reads)} reads did not go to {where}{because}:{_listed(wrong)}"
        )


@contextmanager
def assert_num_reads(
    primary: int | None = None, replica: int | None = None
) -> Iterator[list[Read]]:
    """Assert how many reads inside the block are for which role; ``None``: any number."""
    with capture_reads() as reads:
        yield reads
    found = Counter(read.role for read in reads)
    for role, wanted in ((PRIMARY, primary), (REPLICA, replica)):
        if wanted is not None and found[role] != wanted:
            those = [read for read in reads if read.role == role]
            raise AssertionError(
                f"{found[role]} reads from the {role}, {wanted} expected:{_listed(those)}"
            )


def _listed(reads: list[Read]) -> str:
    return "".join(f"\n  {read}" for read in reads) or " none"


def _check(where: str) -> None:
    known = {*_ROLES, *conf.watched, *conf.primary_of}
    if where not in known:
        raise ValueError(f"{where!r} is none of {', '.join(sorted(known))}")


# Forbidding


class _Culprits(list[AssertionError]):
    """What was done that is forbidden: raised where it was done, and again where it was hidden."""

    def found(self, error: AssertionError) -> None:
        self.append(error)
        raise error


@contextmanager
def forbid_primary(reads: bool = True) -> Iterator[None]:
    """
    Forbid writes and, unless ``reads`` is false, reads that are meant for the primary: each
    raises ``PrimaryForbidden`` at its line, and once more at the end where the code caught that.
    """
    culprits = _Culprits()

    def read(read: counters.Read) -> None:
        if reads and read.role == PRIMARY:
            culprits.found(PrimaryForbidden(f"A read of the primary: {_told(read)}"))

    def write(alias: str, sql: str) -> None:
        culprits.found(PrimaryForbidden(f"A write to {alias} at {here()}: {sql[:120]}"))

    with watched_writes(write), observed(read):
        yield
    if culprits:
        raise culprits[0]


@contextmanager
def watched_writes(write: Callable[[str, str], None]) -> Iterator[None]:
    """Call this with the alias and the text of each write inside the block, before it runs."""
    counters.write_observers.append(write)
    try:
        yield
    finally:
        _take_out(counters.write_observers, write)


@contextmanager
def forbid_replicas() -> Iterator[None]:
    """
    Forbid reads that are meant for a replica: each raises ``ReplicaForbidden`` at its line, and
    once more at the end where the code caught that.
    """
    culprits = _Culprits()

    def read(read: counters.Read) -> None:
        if read.role == REPLICA:
            culprits.found(ReplicaForbidden(f"A read of a replica: {_told(read)}"))

    with observed(read):
        yield
    if culprits:
        raise culprits[0]
