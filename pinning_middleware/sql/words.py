"""
Tables of words that classify the statement that contains them. Every text that is
searched for them is in upper case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

_Words: TypeAlias = tuple[tuple[str, tuple[re.Pattern[str], ...]], ...]
_AS_WORD = r"(?!\w)"
_AS_CALL = r"\s*\("


def _pattern(word: str, following: str = _AS_WORD) -> re.Pattern[str]:
    # The word comes before the condition on what precedes it, because `re` searches for a literal
    # prefix about fifty times as fast. A digit may precede a word: "1INTO" is a number and INTO.
    return re.compile(rf"{word}(?<![^\W\d]{word}){following}")


def _words(*words: str) -> _Words:
    return tuple((word, (_pattern(word),)) for word in words)


def _calls(names_by_part: Mapping[str, Iterable[str]], following: str) -> _Words:
    return tuple(
        (part, tuple(_pattern(re.escape(name), following) for name in names))
        for part, names in names_by_part.items()
    )


def contains(text: str, words: _Words) -> bool:
    return any(
        part in text and any(pattern.search(text) for pattern in patterns)
        for part, patterns in words
    )


# Part that the names have in common → functions that write.
_WRITING_FUNCTIONS: Final = {
    "TVAL": ("NEXTVAL", "SETVAL"),
    "LO_": (
        *("LO_CREAT", "LO_CREATE", "LO_FROM_BYTEA", "LO_IMPORT", "LO_PUT"),
        *("LO_TRUNCATE", "LO_TRUNCATE64", "LO_UNLINK"),
    ),
    "LOWRITE": ("LOWRITE",),
    "PG_": ("PG_NOTIFY", "PG_CURRENT_XACT_ID", "PG_LOGICAL_EMIT_MESSAGE"),
    "TXID_CURRENT": ("TXID_CURRENT",),
    "DBLINK_EXEC": ("DBLINK_EXEC",),
}
_SESSION_LOCKS: Final = (
    *("PG_ADVISORY_LOCK", "PG_ADVISORY_LOCK_SHARED"),
    *("PG_TRY_ADVISORY_LOCK", "PG_TRY_ADVISORY_LOCK_SHARED"),
    *("PG_ADVISORY_UNLOCK", "PG_ADVISORY_UNLOCK_ALL", "PG_ADVISORY_UNLOCK_SHARED"),
)
LOCKING_FUNCTIONS: Final = frozenset(
    {
        *_SESSION_LOCKS,
        *("PG_ADVISORY_XACT_LOCK", "PG_ADVISORY_XACT_LOCK_SHARED"),
        *("PG_TRY_ADVISORY_XACT_LOCK", "PG_TRY_ADVISORY_XACT_LOCK_SHARED"),
        *("GET_LOCK", "RELEASE_LOCK", "RELEASE_ALL_LOCKS", "IS_FREE_LOCK", "IS_USED_LOCK"),
    }
)
SESSION_FUNCTIONS: Final = frozenset(
    {
        *_SESSION_LOCKS,
        *("SET_CONFIG", "SETSEED", "GET_LOCK", "LOAD_EXTENSION"),
        *("DBLINK_CONNECT", "DBLINK_CONNECT_U"),
    }
)
_LOCKING_PARTS: Final = {
    part: tuple(sorted(name for name in LOCKING_FUNCTIONS if part in name))
    for part in ("ADVISORY_", "_LOCK")
}
CALLS_LOCK: Final = _calls(_LOCKING_PARTS, _AS_CALL)
_SESSION_PARTS: Final = {
    "ADVISORY_": _SESSION_LOCKS,
    **{name: (name,) for name in sorted(SESSION_FUNCTIONS - {*_SESSION_LOCKS})},
}
CALLS_SESSION: Final = _calls(_SESSION_PARTS, _AS_CALL)
NAMES_SESSION: Final = _calls(_SESSION_PARTS, _AS_WORD)


class WritingFunctions(NamedTuple):
    """The functions that write, and the patterns that find them."""

    names: frozenset[str]
    calls: _Words
    mentions: _Words  # in a text with comments, which may precede the parenthesis


@lru_cache(maxsize=16)
def writing_functions(more: frozenset[str]) -> WritingFunctions:
    """Return the well-known functions and `more` of them, compiled once for a setting."""
    parts = {**_WRITING_FUNCTIONS, **{name: (name,) for name in sorted(more)}}
    names = frozenset(name for several in parts.values() for name in several)
    return WritingFunctions(names, _calls(parts, _AS_CALL), _calls(parts, _AS_WORD))


FIRST_WORD = re.compile(r"(?:[\s(]|--[^\r\n]*+\r?\n|/\*[^*/!]*+\*/)*+(\w+)")
# First words of statements that need not be writes.
MAY_NOT_WRITE: Final = frozenset(
    {
        *("ABORT", "ANALYZE", "BEGIN", "CLOSE", "COMMIT", "COPY", "DEALLOCATE", "DECLARE"),
        *("DESC", "DESCRIBE", "DISCARD", "END", "EXPLAIN", "FETCH", "LISTEN", "LOCK"),
        *("MOVE", "PRAGMA"),
        *("RELEASE", "RESET", "ROLLBACK", "SAVEPOINT", "SELECT", "SET", "SHOW", "START"),
        *("TABLE", "UNLISTEN", "UNLOCK", "USE", "VALUES", "WAIT", "WITH"),
    }
)
# A SELECT without a semicolon and without any of these words only reads, regardless of its
# quotes and comments.
SELECT_MARKS: Final[_Words] = (
    *_words("INTO", "LOCK", "WITH", "NEXT"),
    # Not FOR in a call of substring(), but a comment may follow.
    ("FOR", (_pattern("FOR", r"(?:\s+(?:UPDATE|SHARE|NO|KEY)\b|\s*+(?:/\*|--|\#))"),)),
    *_calls(_LOCKING_PARTS, _AS_WORD),
)
CHANGES: Final[_Words] = (
    *_words("UPDATE", "DELETE", "MERGE", "INTO"),
    *((word, (_pattern(word, r"(?!\w)(?!\s*\()"),)) for word in ("INSERT", "REPLACE")),
    ("NEXT", (_pattern("NEXT", r"\s+VALUE\s+FOR\b"),)),
)
# Databases other than the known ones may need no semicolon between two statements.
OTHER_STATEMENTS: Final[_Words] = (
    *_words("WITH", "EXEC", "EXECUTE", "CALL", "CREATE", "ALTER", "DROP", "GRANT", "REVOKE"),
    *_words("USE", "OPEN", "DECLARE", "PREPARE", "NEXTVAL", "SETVAL", "LOCK"),
    ("TRUNCATE", (_pattern("TRUNCATE", r"(?!\w)(?!\s*\()"),)),
)
SET_WORD = _pattern("SET")
LOCKING_CLAUSE = re.compile(
    r"FOR(?<![^\W\d]FOR)\s+(?:(?:NO\s+KEY\s+)?UPDATE|(?:KEY\s+)?SHARE)\b"
    r"|LOCK(?<![^\W\d]LOCK)\s+IN\s+SHARE\s+MODE\b"
)
TRANSACTION_CONTROL = re.compile(
    r"(?:COMMIT|ROLLBACK)(?:\s+WORK)?|SAVEPOINT\s+\w+|RELEASE\s+SAVEPOINT\s+\w+"
    r"|ROLLBACK\s+(?:WORK\s+)?TO\s+(?:SAVEPOINT\s+)?\w+"
)
# ROLLBACK TO SAVEPOINT does not end the transaction, COMMIT PREPARED not that of this session.
TRANSACTION_BEGIN = re.compile(
    r"(?:BEGIN|START\s+TRANSACTION)\b|(?:COMMIT|ROLLBACK|END|ABORT)\b[\w\s]*\bAND\s+CHAIN\b"
)
TRANSACTION_END = re.compile(
    r"(?:COMMIT|ROLLBACK|END|ABORT)\b(?!.*\bTO\b)(?!\s+PREPARED\b)|PREPARE\s+TRANSACTION\b",
    re.DOTALL,
)
MAY_END_TRANSACTION: Final = frozenset({"COMMIT", "ROLLBACK", "END", "ABORT", "PREPARE"})
MAY_BEGIN_TRANSACTION: Final = MAY_END_TRANSACTION | {"BEGIN", "START"}
# MySQL commits the open transaction before these.
# https://dev.mysql.com/doc/refman/8.4/en/implicit-commit.html
IMPLICIT_COMMITS: Final = frozenset(
    {
        *("ALTER", "ANALYZE", "BEGIN", "CACHE", "CHECK", "CREATE", "DROP", "FLUSH", "GRANT"),
        *("INSTALL", "LOCK", "OPTIMIZE", "RENAME", "REPAIR", "RESET", "REVOKE", "START"),
        *("TRUNCATE", "UNINSTALL"),
    }
)

_SET = r"""SET\s+(?!PASSWORD\b)(?:(?:SESSION|LOCAL)\s+)?(?:
    (?:TRANSACTION|CHARACTERISTICS|CONSTRAINTS|NAMES|CHARSET|CHARACTER\s+SET|TIME\s+ZONE|ROLE
        |AUTHORIZATION|SCHEMA|XML\s+OPTION)\b
    | @{0,2}\s*[\w$]+(?:\s*\.\s*[\w$]+)*\s*(?::?=|TO\b)
)"""
PERSISTENT_SET = re.compile(r"\b(?:GLOBAL|PERSIST|PERSIST_ONLY)\b")
NO_DATA_ACCESS = re.compile(
    rf"""(?:
        (?:BEGIN|END|COMMIT|ROLLBACK|ABORT)
            (?:\s+(?:WORK|TRANSACTION|DEFERRED|IMMEDIATE|EXCLUSIVE|ISOLATION|READ
                    |NOT\s+DEFERRABLE|DEFERRABLE|AND|TO)\b[\w\s,]*)?$
        | START\s+TRANSACTION\b[\w\s,]*$
        | {_SET}
        | RESET\s+(?!(?:MASTER|SLAVE|REPLICA|QUERY|PERSIST|BINARY)\b)[\w.$\s]+$
        | UNLOCK\s+TABLES?$
        | (?:SAVEPOINT|RELEASE|SHOW|USE|DEALLOCATE|DISCARD|FETCH|MOVE|CLOSE|LISTEN|UNLISTEN
            |WAIT\s+FOR)\b
    )""",
    re.VERBOSE,
)
_PRAGMA = r"PRAGMA\s+(?:\w+\s*\.\s*)?"
_LOCAL_PRAGMA = (
    "(?:ANALYSIS_LIMIT|AUTOMATIC_INDEX|BUSY_TIMEOUT|CACHE_SIZE|CACHE_SPILL|CASE_SENSITIVE_LIKE"
    "|CELL_SIZE_CHECK|CHECKPOINT_FULLFSYNC|DEFER_FOREIGN_KEYS|FOREIGN_KEYS|FULLFSYNC"
    "|IGNORE_CHECK_CONSTRAINTS|LEGACY_ALTER_TABLE|MMAP_SIZE|QUERY_ONLY|READ_UNCOMMITTED"
    "|RECURSIVE_TRIGGERS|REVERSE_UNORDERED_SELECTS|SECURE_DELETE|SYNCHRONOUS|TEMP_STORE|THREADS"
    "|TRUSTED_SCHEMA|WAL_AUTOCHECKPOINT)"
)
LOCAL_PRAGMA_SET = re.compile(rf"{_PRAGMA}{_LOCAL_PRAGMA}\b")
PRAGMA_READ = re.compile(
    rf"""{_PRAGMA}(?:
        (?:COLLATION_LIST|COMPILE_OPTIONS|DATABASE_LIST|DATA_VERSION|FOREIGN_KEY_CHECK
            |FOREIGN_KEY_LIST|FREELIST_COUNT|FUNCTION_LIST|INDEX_INFO|INDEX_LIST|INDEX_XINFO
            |INTEGRITY_CHECK|MODULE_LIST|PAGE_COUNT|PRAGMA_LIST|QUICK_CHECK|TABLE_INFO
            |TABLE_LIST|TABLE_XINFO)\b
        | (?:{_LOCAL_PRAGMA}|APPLICATION_ID|AUTO_VACUUM|ENCODING|JOURNAL_MODE|JOURNAL_SIZE_LIMIT
            |LOCKING_MODE|MAX_PAGE_COUNT|PAGE_SIZE|SCHEMA_VERSION|USER_VERSION|WRITABLE_SCHEMA)$
    )""",
    re.VERBOSE,
)
_DECLARE = r"DECLARE\s+\w+\s+(?:(?:BINARY|ASENSITIVE|INSENSITIVE|NO|SCROLL)\s+)*CURSOR"
READ = re.compile(
    rf"(?:SELECT|VALUES|TABLE|WITH|{_DECLARE})\b|COPY\s*\("
    r"|COPY\s+(?:BINARY\s+)?\w+(?:\s*\.\s*\w+)*\s*(?:\([^()]*\)\s*)?TO\b"
)
# MariaDB: settings for the single statement that follows.
SET_STATEMENT = re.compile(r"SET\s+STATEMENT\b.*?\bFOR\b", re.DOTALL)
EXPLAIN = re.compile(r"(?:EXPLAIN|DESCRIBE|DESC)\b(?!\s+PLAN\b)\s*")
OPTIONS = re.compile(r"\((?!\s*(?:SELECT|VALUES|TABLE|WITH)\b)([^()]*)\)\s*")
OPTION_WORDS = re.compile(
    r"(?:(?:ANALY[ZS]E|VERBOSE|EXTENDED|PARTITIONS|FORMAT\s*=\s*\w+)(?!\w)\s*)++"
)
ANALYZE = re.compile(r"\bANALY[ZS]E\b")
# MariaDB: runs the statement that follows, and returns its plan.
# https://mariadb.com/kb/en/analyze-statement/
ANALYZE_STATEMENT = re.compile(
    r"ANALYZE\s+(?:FORMAT\s*=\s*\w+\s+)?(?=\(*\s*(?:SELECT|WITH|UPDATE|DELETE|INSERT|REPLACE)\b)"
)

TRANSACTION_CONFIG = re.compile(r"\bSET_CONFIG\s*\([^(),]*,[^(),]*,\s*TRUE\s*\)")
TEMPORARY = re.compile(r"\b(?:PG_)?TEMP(?:ORARY)?\b")
SESSION_TARGET = re.compile(
    r"INTO(?<![^\W\d]INTO)\s+(?:@|(?:(?:LOCAL|GLOBAL)\s+)?(?:PG_)?TEMP(?:ORARY)?\b)"
)
# Settings that end with the transaction, or apply to the next one only.
TRANSACTION_SET = {
    "postgresql": re.compile(r"SET\s+(?:LOCAL|TRANSACTION|CONSTRAINTS)\s+(?!=|TO\b)"),
    "mysql": re.compile(r"SET\s+TRANSACTION\b"),  # where LOCAL means SESSION
}
HOLD = re.compile(r"\bWITH\s+HOLD\b")
KEEPS_SESSION: Final = frozenset(
    {
        *("ABORT", "ALTER", "ANALYZE", "BEGIN", "CLOSE", "COMMENT", "COMMIT", "COPY", "CREATE"),
        *("DELETE", "DESC", "DROP", "END", "EXPLAIN", "FETCH", "GRANT", "INSERT", "MERGE"),
        *("MOVE", "NOTIFY", "REFRESH", "REINDEX", "RELEASE", "REPLACE", "REVOKE", "ROLLBACK"),
        *("SAVEPOINT", "SELECT", "SHOW", "START", "TABLE", "TRUNCATE", "UPDATE", "VACUUM"),
        *("VALUES", "WITH"),
    }
)
DATA_STATEMENTS: Final = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE"})
INTO: Final = _words("INTO")

_NAME = r'(?:"(?:[^"]|"")+"|`[^`]+`|[\w$]+)'
_TABLE = rf"{_NAME}(?:\.{_NAME})*"
TARGET = re.compile(
    rf"""\s*(?:
        (?:INSERT(?:\s+OR\s+\w+|\s+IGNORE)?\s+INTO|REPLACE\s+INTO)\s+(?P<insert>{_TABLE})
        | UPDATE(?:\s+OR\s+\w+|\s+ONLY)?\s+(?P<update>{_TABLE})\s+SET\b
        | DELETE\s+FROM(?:\s+ONLY)?\s+(?P<delete>{_TABLE})\s*(?:$|;|WHERE\b|RETURNING\b)
        | TRUNCATE(?:\s+TABLE)?\s+(?P<truncate>{_TABLE})\s*;?\s*$
    )""",
    re.IGNORECASE | re.VERBOSE,
)


UPSERT = re.compile(r"\b(?:DO|KEY)\s+UPDATE\b")
