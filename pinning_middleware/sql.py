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
_SUSPICIOUS_IN_SELECT = (";", "--", "/*", "INTO", "LOCK", "#")
_FOR = re.compile(r"\bFOR\b")

# What hides words from a database. Each reads quotes, comments and backslashes in its own way, so
# that one database's text is another's statement; a second reading of a database is that of a
# setting which says whether a backslash escapes a quote.
_BLOCK = r"/\*.*?\*/"
_SINGLE, _DOUBLE = r"'(?:[^']|'')*'", r'"(?:[^"]|"")*"'
_SINGLE_ESCAPED, _DOUBLE_ESCAPED = r"'(?:[^'\\]|\\.|'')*'", r'"(?:[^"\\]|\\.|"")*"'
_WORD = r"\w$\x80-\U0010ffff"
_TAG = r"[A-Za-z_\x80-\U0010ffff][\w\x80-\U0010ffff]*"
_POSTGRESQL = (
    rf"--[^\r\n]*|{_BLOCK}|(?<![{_WORD}])[Ee]{_SINGLE_ESCAPED}|{_DOUBLE}"
    rf"|(?<![{_WORD}])\$(?P<tag>{_TAG}|)\$.*?\$(?P=tag)\$"
)
_MYSQL = rf"--(?=[\x00-\x20]|\Z)[^\n]*|\#[^\n]*|{_BLOCK}|`[^`]*`"
_READINGS = {
    "postgresql": (rf"{_POSTGRESQL}|{_SINGLE}", rf"{_POSTGRESQL}|{_SINGLE_ESCAPED}"),
    "mysql": (
        rf"{_MYSQL}|{_SINGLE}|{_DOUBLE}",
        rf"{_MYSQL}|{_SINGLE_ESCAPED}|{_DOUBLE_ESCAPED}",
    ),
    "sqlite": (rf"--[^\n]*|{_BLOCK}|{_SINGLE}|{_DOUBLE}|`[^`]*`|\[[^\]]*\]",),
}
_BARE = {
    vendor: tuple(re.compile(reading, re.DOTALL) for reading in readings)
    for vendor, readings in _READINGS.items()
}
_EVERY_READING = tuple(reading for readings in _BARE.values() for reading in readings)
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
            (?:\s+(?:WORK|TRANSACTION|TRAN|DEFERRED|IMMEDIATE|EXCLUSIVE|ISOLATION|READ
                    |NOT\s+DEFERRABLE|DEFERRABLE|AND|TO)\b[\w\s,]*)?
        | START\s+TRANSACTION\b[\w\s,]*
        | (?:SAVEPOINT|RELEASE|SET|RESET|SHOW|PRAGMA|USE|DEALLOCATE|DISCARD
            |FETCH|MOVE|CLOSE|LISTEN|UNLISTEN|WAIT\s+FOR)\b.*
        | UNLOCK\s+TABLES?
    )\s*$""",
    re.DOTALL | re.VERBOSE,
)
_DECLARE = r"DECLARE\s+\w+\s+(?:(?:BINARY|ASENSITIVE|INSENSITIVE|NO|SCROLL)\s+)*CURSOR"
_READ = re.compile(rf"(?:SELECT|VALUES|TABLE|WITH|{_DECLARE})\b")
_EXPLAIN = re.compile(
    r"(?:EXPLAIN|DESCRIBE|DESC)\b\s*"
    r"(?:(?:\([^()]*\)|(?:ANALY[ZS]E|VERBOSE|EXTENDED|PARTITIONS)\b|FORMAT\s*=\s*\w+)\s*)*"
)
_ANALYZE = re.compile(r"\bANALY[ZS]E\b")
# MariaDB: settings for one statement, which follows.
_SET_STATEMENT = re.compile(r"SET\s+STATEMENT\b.*?\bFOR\b", re.DOTALL)

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


def kind_of(sql: str, vendor: str = "") -> Kind:
    """
    Return what the statement, or the gravest of several statements, does. ``vendor`` is that of
    Django's connection; for one that is not known here, the gravest of all readings counts.
    """
    return (_cached_kind if len(sql) <= _CACHED_LENGTH else _kind)(sql, vendor)


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


def _kind(sql: str, vendor: str) -> Kind:
    text = sql.upper()
    if (
        _PLAIN_SELECT.match(text)
        and not any(mark in text for mark in _SUSPICIOUS_IN_SELECT)
        and not _FOR.search(text)
    ):
        return Kind.READ
    if _UNREADABLE_COMMENT.search(sql):
        return Kind.WRITE
    readings = _BARE.get(vendor, _EVERY_READING)
    return max(_gravest(reading.sub(_blank, sql).upper()) for reading in readings)


_cached_kind = lru_cache(maxsize=1024)(_kind)


def _blank(found: re.Match[str]) -> str:
    # A name keeps its place as a word, a comment leaves a gap.
    return " " if found[0].startswith(("--", "/*", "#")) else " X "


def _gravest(bare: str) -> Kind:
    return max((_statement(part) for part in bare.split(";")), default=Kind.NEITHER)


def _statement(bare: str) -> Kind:
    text = bare.strip().lstrip("( \t\r\n")
    if not text:
        return Kind.NEITHER
    if found := _SET_STATEMENT.match(text):
        return _statement(text[found.end() :])
    if found := _EXPLAIN.match(text):
        return _explain(found[0], text[found.end() :])
    if _READ.match(text):
        return _query(text)
    if _NEITHER.match(text):
        return Kind.NEITHER
    if text.startswith("LOCK "):
        return Kind.LOCK
    if text.startswith("COPY "):
        return _copy(text)
    return Kind.WRITE


def _explain(options: str, statement: str) -> Kind:
    if _ANALYZE.search(options):
        return _statement(statement)
    # An option that is not known may stand before the word.
    return _query(statement) if _ANALYZE.search(statement) else Kind.NEITHER


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
