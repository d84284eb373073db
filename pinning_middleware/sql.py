"""
What a statement does. Pure: text in, one of four words out.

It fails closed: whatever is not recognised is a write. It cannot see into functions, so a
``SELECT`` of a function that writes is a read here.
"""

from __future__ import annotations

import re
from enum import IntEnum
from functools import lru_cache

__all__ = ["Kind", "kind_of", "table_of"]


class Kind(IntEnum):
    """What a statement does to the data, mildest first."""

    NEITHER = 0  # transaction control, SET, SHOW, plain EXPLAIN
    READ = 1
    LOCK = 2  # a read that locks what it reads
    WRITE = 3


_CACHED_LENGTH = 4096

_PLAIN_SELECT = re.compile(r"\s*\(*\s*SELECT\s")
_SUSPICIOUS_IN_SELECT = (";", "--", "/*", "INTO", " FOR", "\tFOR", "\nFOR", ")FOR", "LOCK", "#")

_COMMENTS = r"--[^\n]*|/\*.*?\*/"
_IDENTIFIERS = r'"(?:[^"]|"")*"|`[^`]*`'
_DOLLARS = r"\$(?P<tag>[A-Za-z_]\w*|)\$.*?\$(?P=tag)\$"
# Whether a backslash escapes a quote depends on the database and its settings.
_BARE = re.compile(rf"{_COMMENTS}|'(?:[^']|'')*'|{_IDENTIFIERS}|{_DOLLARS}", re.DOTALL)
_BARE_BACKSLASH = re.compile(
    rf"{_COMMENTS}|'(?:[^'\\]|\\.|'')*'|\"(?:[^\"\\]|\\.|\"\")*\"|`[^`]*`|{_DOLLARS}",
    re.DOTALL,
)
# MySQL and MariaDB run what stands in these; PostgreSQL nests comments, others do not.
_UNREADABLE_COMMENT = re.compile(r"/\*M?!|/\*(?:(?!\*/).)*/\*", re.DOTALL)

_LOCKING = re.compile(
    r"\bFOR\s+(?:NO\s+KEY\s+)?UPDATE\b|\bFOR\s+(?:KEY\s+)?SHARE\b|\bLOCK\s+IN\s+SHARE\s+MODE\b"
)
_CHANGE = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE|INTO)\b")
_INNERMOST = re.compile(r"\([^()]*\)")

_NEITHER = re.compile(
    r"""(?:
        (?:BEGIN|END|COMMIT|ROLLBACK|ABORT)
            (?:\s+(?:WORK|TRANSACTION|TRAN|DEFERRED|IMMEDIATE|EXCLUSIVE|ISOLATION|READ|NOT
                    |DEFERRABLE|AND|TO)\b.*)?
        | START\s+TRANSACTION\b.*
        | (?:SAVEPOINT|RELEASE|SET|RESET|SHOW|EXPLAIN|DESCRIBE|DESC|PRAGMA|USE|DEALLOCATE|DISCARD
            |FETCH|MOVE|CLOSE|LISTEN|UNLISTEN)\b.*
        | UNLOCK\s+TABLES?
    )\s*$""",
    re.DOTALL | re.VERBOSE,
)
_READ = re.compile(r"(?:SELECT|VALUES|TABLE|WITH|DECLARE)\b")
_EXPLAIN_ANALYZE = re.compile(r"EXPLAIN\b[^A-Z]*(?:\w+[^A-Z]+)*?ANALY[ZS]E\b")
_SET_STATEMENT = re.compile(r"SET\s+STATEMENT\b")

_NAME = r'(?:"(?:[^"]|"")+"|`[^`]+`|[\w$]+)'
_TABLE = rf"{_NAME}(?:\.{_NAME})*"
_TARGET = re.compile(
    rf"""\s*(?:
        (?:INSERT(?:\s+OR\s+\w+|\s+IGNORE)?\s+INTO|REPLACE\s+INTO)\s+(?P<insert>{_TABLE})
        | UPDATE(?:\s+OR\s+\w+|\s+ONLY)?\s+(?P<update>{_TABLE})\s+SET\b
        | DELETE\s+FROM(?:\s+ONLY)?\s+(?P<delete>{_TABLE})\s*(?:$|;|WHERE\b|RETURNING\b)
        | TRUNCATE(?:\s+TABLE)?\s+(?P<truncate>{_TABLE})\s*;?\s*$
    )""",
    re.IGNORECASE | re.VERBOSE,
)


def kind_of(sql: str) -> Kind:
    """Return what the statement, or the gravest of several statements, does."""
    return _cached_kind(sql) if len(sql) <= _CACHED_LENGTH else _kind(sql)


def table_of(sql: str) -> str | None:
    """
    Return the one table that a write changes, without quotes and in lower case, with its schema
    where the statement names it; ``None`` where that is not plain to see.
    """
    if "/*" in sql or "--" in sql or len([s for s in sql.split(";") if s.strip()]) != 1:
        return None
    found = _TARGET.match(sql)
    if found is None or found.lastgroup is None:
        return None
    return re.sub(r'["`]', "", found[found.lastgroup]).lower()


def _kind(sql: str) -> Kind:
    text = sql.upper()
    if _PLAIN_SELECT.match(text) and not any(mark in text for mark in _SUSPICIOUS_IN_SELECT):
        return Kind.READ
    if _UNREADABLE_COMMENT.search(sql):
        return Kind.WRITE
    gravest = _gravest(_BARE.sub(_blank, text))
    if "\\" in sql:
        gravest = max(gravest, _gravest(_BARE_BACKSLASH.sub(_blank, text)))
    return gravest


_cached_kind = lru_cache(maxsize=1024)(_kind)


def _blank(found: re.Match[str]) -> str:
    # A name keeps its place as a word, everything else leaves a gap.
    return " X " if found[0][0] in "\"`'$" else " "


def _gravest(bare: str) -> Kind:
    return max((_statement(part) for part in bare.split(";")), default=Kind.NEITHER)


def _statement(bare: str) -> Kind:
    text = bare.strip().lstrip("( \t\r\n")
    if not text:
        return Kind.NEITHER
    if _EXPLAIN_ANALYZE.match(text) or _SET_STATEMENT.match(text) or _READ.match(text):
        return _query(text)
    if _NEITHER.match(text):
        return Kind.NEITHER
    if text.startswith("LOCK "):
        return Kind.LOCK
    if text.startswith("COPY "):
        return _copy(text)
    return Kind.WRITE


def _query(text: str) -> Kind:
    unlocked, locks = _LOCKING.subn(" ", text)
    if _CHANGE.search(unlocked):
        return Kind.WRITE
    return Kind.LOCK if locks else Kind.READ


def _copy(text: str) -> Kind:
    query = text
    while (shorter := _INNERMOST.sub(" ", text)) != text:
        text = shorter
    leaves = re.search(r"\bTO\b", text) and not re.search(r"\bFROM\b", text)
    return Kind.READ if leaves and not _CHANGE.search(query) else Kind.WRITE
