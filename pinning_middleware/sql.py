"""
What a statement does. Pure: text in, one of four words out.

It fails closed: whatever is not recognised is a write, and alters its session. It cannot see into
functions: a ``SELECT`` of a function that writes is a read here, but for the few well-known ones
of ``_WRITING_FUNCTION``. What an ``INSERT`` leaves in its session (``lastval()``,
``LAST_INSERT_ID()``) does not count as altering it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

__all__ = ["Kind", "alters_session", "kind_of", "table_of"]


class Kind(IntEnum):
    """What a statement does to the data, mildest first."""

    NEITHER = 0  # transaction control, SET, SHOW, plain EXPLAIN
    READ = 1
    LOCK = 2  # a read that takes or gives back locks
    WRITE = 3


_CACHED_LENGTH = 4096


class _Reading(NamedTuple):
    """How a database tells words from what only looks like them."""

    token: re.Pattern[str]  # whatever hides words; its group "cut" is one that never ends
    nests: bool = False  # comments inside of comments
    runs: bool = False  # comments that are run


# Each database reads quotes, comments and backslashes in its own way, so that one's text is
# another's statement; a further reading of the same one is that of a setting which says whether a
# backslash escapes, or whether double quotes are those of names.
_SINGLE, _DOUBLE = (rf"{q}(?:[^{q}]++|{q}{q})*+{q}" for q in "'\"")
_SINGLE_ESCAPED, _DOUBLE_ESCAPED = (rf"{q}(?:[^{q}\\]++|\\.|{q}{q})*+{q}" for q in "'\"")
_NOT_IN_WORD = r"(?<![\w$\x80-\U0010ffff])"
_TAG = r"\$(?:[A-Za-z_\x80-\U0010ffff][\w\x80-\U0010ffff]*+)?\$"
# A literal goes on in the next line, where its E still counts.
_NEXT_LINE = r"(?:[ \t\f\v]|--[^\r\n]*+)*+[\r\n](?:[ \t\f\v\r\n]|--[^\r\n]*+[\r\n])*+"
_ESCAPE_STRING = rf"{_NOT_IN_WORD}[Ee]{_SINGLE_ESCAPED}(?:{_NEXT_LINE}{_SINGLE_ESCAPED})*+"
_DOLLARS = rf"{_NOT_IN_WORD}(?P<tag>{_TAG}).*?(?P=tag)"
_UNICODE = rf"{_NOT_IN_WORD}[Uu]&(?:{_SINGLE}|{_DOUBLE})"
_PG_CUT = rf"{_NOT_IN_WORD}(?:[Ee]'|[Uu]&['\"]|{_TAG})|['\"]"
_PG = rf"--[^\r\n]*+|/\*|{_ESCAPE_STRING}|{_DOLLARS}|{_UNICODE}|{_DOUBLE}"
_MYSQL = r"--(?=[\x00-\x20]|\Z)[^\n]*+|\#[^\n]*+|/\*|`[^`]*+`"
_OTHERS = rf"--[^\n]*+|/\*|{_SINGLE}|{_DOUBLE}|`[^`]*+`|\[[^\]]*+\]"


def _reading(token: str, cut: str, nests: bool = False, runs: bool = False) -> _Reading:
    return _Reading(re.compile(rf"{token}|(?P<cut>{cut})", re.DOTALL), nests, runs)


_READINGS = {
    "postgresql": (
        _reading(rf"{_PG}|{_SINGLE}", _PG_CUT, nests=True),
        _reading(rf"{_PG}|{_SINGLE_ESCAPED}", _PG_CUT, nests=True),
    ),
    "mysql": (
        _reading(rf"{_MYSQL}|{_SINGLE}|{_DOUBLE}", "['\"`]", runs=True),
        _reading(rf"{_MYSQL}|{_SINGLE_ESCAPED}|{_DOUBLE_ESCAPED}", "['\"`]", runs=True),
        _reading(rf"{_MYSQL}|{_SINGLE_ESCAPED}|{_DOUBLE}", "['\"`]", runs=True),
    ),
    "sqlite": (_reading(_OTHERS, r"['\"`\[]"),),
    "microsoft": (_reading(_OTHERS, r"['\"`\[]", nests=True),),
}
# Where two statements need a semicolon between them; elsewhere any word may begin one.
_SEMICOLONS = frozenset({"postgresql", "mysql", "sqlite"})
_EDGE_OF_COMMENT = re.compile(r"/\*|\*/")

_ANYTHING = "CALL"  # a statement of which nothing is known

_FIRST_WORD = re.compile(r"(?:[\s(]|--[^\r\n]*+\r?\n|/\*[^*/!]*+\*/)*+(\w+)")
_MAY_BE_MILD = re.compile(
    "ABORT|BEGIN|CLOSE|COMMIT|COPY|DEALLOCATE|DECLARE|DESC|DESCRIBE|DISCARD|END|EXPLAIN|FETCH"
    "|LISTEN|LOCK|MOVE|PRAGMA|RELEASE|RESET|ROLLBACK|SAVEPOINT|SELECT|SET|SHOW|START|TABLE"
    "|UNLISTEN|UNLOCK|USE|VALUES|WAIT|WITH"
).fullmatch
# A SELECT without any of these is a plain one, whatever its quotes and comments mean, ...
_MARKS = (";", "--", "INTO", "LOCK", "WITH")
_MARKS_OF = {"postgresql": _MARKS, "mysql": (*_MARKS, "#"), "sqlite": _MARKS}
_MARKS_ANYWHERE = (
    *(*_MARKS, "#", "INSERT", "UPDATE", "DELETE", "MERGE", "EXEC", "CREATE", "ALTER", "DROP"),
    *("CALL", "GRANT", "REVOKE", "DENY", "TVAL", "DBCC", "KILL", "BACKUP", "RESTORE", "SHUTDOWN"),
    *("RECONFIG", "WRITETEXT", "UPDATETEXT", "RENAME", "UPSERT", "REPLACE", "TRUNC"),
)
# ... and without a call of these, behind which a comment may stand.
_WRITING_FUNCTIONS = (
    *("NEXTVAL", "SETVAL", "LO_CREAT", "LO_CREATE", "LO_FROM_BYTEA", "LO_IMPORT", "LO_PUT"),
    *("LO_TRUNCATE", "LO_TRUNCATE64", "LO_UNLINK", "LOWRITE", "PG_NOTIFY", "TXID_CURRENT"),
    *("PG_CURRENT_XACT_ID", "PG_LOGICAL_EMIT_MESSAGE", "DBLINK_EXEC"),
)
_SUSPECT_BEFORE_PARENTHESIS = (*_WRITING_FUNCTIONS, "*/")
_FOR = re.compile(r"(?<![A-Z_])FOR\b")

_START = r"(?<![^\W\d])"  # of a word: a digit before it is a number
_LOCKING = re.compile(
    rf"""{_START}(?:
        FOR\s+(?:NO\s+KEY\s+)?UPDATE | FOR\s+(?:KEY\s+)?SHARE | LOCK\s+IN\s+SHARE\s+MODE
        | UPDLOCK | XLOCK | HOLDLOCK | TABLOCKX?
        | (?:PG_(?:TRY_)?ADVISORY_\w+|GET_LOCK|RELEASE_LOCK|RELEASE_ALL_LOCKS|IS_(?:FREE|USED)_LOCK)
            (?=\s*\()
    )\b""",
    re.VERBOSE,
)
_WRITING_FUNCTION = f"(?:{'|'.join(_WRITING_FUNCTIONS)})"
_SEQUENCE = r"NEXT\s+VALUE\s+FOR\b"
_CHANGE = re.compile(
    rf"{_START}(?:(?:UPDATE|DELETE|MERGE|INTO)\b|(?:INSERT|REPLACE)\b(?!\s*\()"
    rf"|{_WRITING_FUNCTION}\s*\(|{_SEQUENCE})"
)
_ANY_CHANGE = re.compile(
    rf"""{_START}(?:
        (?:UPDATE|DELETE|MERGE|INTO|EXEC|EXECUTE|CREATE|ALTER|DROP|CALL|GRANT|REVOKE|DENY|NEXTVAL
            |DBCC|KILL|BACKUP|RESTORE|SHUTDOWN|RECONFIGURE|WRITETEXT|UPDATETEXT|RENAME|UPSERT)\b
        | (?:INSERT|REPLACE|TRUNCATE)\b(?!\s*\()
        | {_WRITING_FUNCTION}\s*\( | {_SEQUENCE}
    )""",
    re.VERBOSE,
)
_QUOTED_FUNCTION = re.compile(rf"{_WRITING_FUNCTION}|PG_\w*ADVISORY_\w+|SET_CONFIG|SETSEED")

_SET = r"""SET\s+(?!PASSWORD\b)(?:(?:SESSION|LOCAL)\s+)?(?:
    (?:TRANSACTION|CHARACTERISTICS|CONSTRAINTS|NAMES|CHARSET|CHARACTER\s+SET|TIME\s+ZONE|ROLE
        |AUTHORIZATION|SCHEMA|XML\s+OPTION)\b
    | @{0,2}\s*[\w$]+(?:\s*\.\s*[\w$]+)*\s*(?::?=|TO\b)
    | (?:DATEFIRST|DATEFORMAT|DEADLOCK_PRIORITY|LANGUAGE|LOCK_TIMEOUT|ROWCOUNT|TEXTSIZE)\b
    | \w+\s+(?:[\w.]+\s+)?(?:ON|OFF)\b
)"""
_FOR_ALL = re.compile(r"\b(?:GLOBAL|PERSIST|PERSIST_ONLY)\b")
_NEITHER = re.compile(
    rf"""(?:
        (?:BEGIN|END|COMMIT|ROLLBACK|ABORT)
            (?:\s+(?:WORK|TRANSACTION|TRAN|DEFERRED|IMMEDIATE|EXCLUSIVE|ISOLATION|READ
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
_LOCAL_PRAGMA_SET = re.compile(rf"{_PRAGMA}{_LOCAL_PRAGMA}\b")
_PRAGMA_READ = re.compile(
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
_READ = re.compile(
    rf"(?:SELECT|VALUES|TABLE|WITH|{_DECLARE})\b|COPY\s*\("
    r"|COPY\s+(?:BINARY\s+)?\w+(?:\s*\.\s*\w+)*\s*(?:\([^()]*\)\s*)?TO\b"
)
# MariaDB: settings for one statement, which follows.
_SET_STATEMENT = re.compile(r"SET\s+STATEMENT\b.*?\bFOR\b", re.DOTALL)
_EXPLAIN = re.compile(r"(?:EXPLAIN|DESCRIBE|DESC)\b(?!\s+PLAN\b)\s*")
_OPTIONS = re.compile(r"\((?!\s*(?:SELECT|VALUES|TABLE|WITH)\b)([^()]*)\)\s*")
_OPTION_WORDS = re.compile(
    r"(?:(?:ANALY[ZS]E|VERBOSE|EXTENDED|PARTITIONS|FORMAT\s*=\s*\w+)(?!\w)\s*)++"
)
_ANALYZE = re.compile(r"\bANALY[ZS]E\b")

# What leaves something behind in the session.
_SESSION_MARKS = (
    *(";", "SET_CONFIG", "ADVISORY_", "GET_LOCK", "TEMP", "@", "SETSEED", "DBLINK_CONN"),
    "LOAD_EXTENSION",
)
_TRANSACTION_CONFIG = re.compile(r"\bSET_CONFIG\s*\([^(),]*,[^(),]*,\s*TRUE\s*\)")
_SESSION = re.compile(
    r"""\b(?:SET_CONFIG|PG_(?:TRY_)?ADVISORY_(?!XACT)\w+|GET_LOCK|SETSEED|DBLINK_CONNECT(?:_U)?
            |LOAD_EXTENSION)\s*\(
        | :=
        | \bINTO\s+(?:@|(?:(?:LOCAL|GLOBAL)\s+)?(?:PG_)?TEMP(?:ORARY)?\b)
    """,
    re.VERBOSE,
)
_TEMPORARY = re.compile(r"\b(?:PG_)?TEMP(?:ORARY)?\b")
_PASSING_SET = {
    "postgresql": re.compile(r"SET\s+(?:LOCAL|TRANSACTION|CONSTRAINTS)\s+(?!=|TO\b)"),
    "mysql": re.compile(r"SET\s+TRANSACTION\b"),  # where LOCAL means SESSION
}
_HOLD = re.compile(r"\bWITH\s+HOLD\b")
_LEAVES_SESSION = re.compile(
    "ABORT|ALTER|ANALYZE|BEGIN|CLOSE|COMMENT|COMMIT|COPY|CREATE|DELETE|DESC|DROP|END|EXPLAIN|FETCH"
    "|GRANT|INSERT|MERGE|MOVE|NOTIFY|REFRESH|REINDEX|RELEASE|REPLACE|REVOKE|ROLLBACK|SAVEPOINT"
    "|SELECT|SHOW|START|TABLE|TRUNCATE|UPDATE|VACUUM|VALUES|WITH"
).fullmatch
_DATA_WORDS = ("SELECT", "INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE")
_UPDATE_SET = re.compile(r"\bUPDATE\s+(?:[\w.$]+\s+){0,6}SET\b|\b(?:INSERT|MERGE)\s+INTO\b")
_SESSION_WORD = re.compile(
    rf"{_START}(?:SET|USE|EXEC|EXECUTE|CALL|DECLARE|CREATE|ALTER|INTO|OPEN|PREPARE)\b"
)

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


# What a write may have behind its target to be another change as well.
_MARKS_BEHIND = (*_MARKS_ANYWHERE, *_WRITING_FUNCTIONS)
_UPSERT = re.compile(r"\b(?:DO|KEY)\s+UPDATE\b")


def kind_of(sql: str, vendor: str = "") -> Kind:
    """
    Return what the statement, or the gravest of several statements, does. ``vendor`` is that of
    Django's connection; for one that is not known here, the gravest of all readings counts.
    """
    return (_cached_kind if len(sql) <= _CACHED_LENGTH else _kind)(sql, vendor)


def alters_session(sql: str, vendor: str = "") -> bool:
    """
    Return whether the session may be another one afterwards than a fresh one: it has settings,
    variables, temporary tables, locks or prepared statements of its own.
    """
    return (_cached_alters if len(sql) <= _CACHED_LENGTH else _alters)(sql, vendor)


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
    # Another statement may follow, or stand inside, where this one is not done yet.
    rest = sql[found.end() :].upper()
    if any(mark in rest for mark in _MARKS_BEHIND) and _ANY_CHANGE.search(_UPSERT.sub(" ", rest)):
        return None
    return re.sub(r'["`]', "", found[found.lastgroup]).lower()


def _first_word(text: str) -> str:
    found = _FIRST_WORD.match(text)
    return found[1].upper() if found else ""


def _kind(sql: str, vendor: str) -> Kind:
    first = _first_word(sql)
    if first == "SELECT":
        if _is_plain(sql.upper(), _MARKS_OF.get(vendor, _MARKS_ANYWHERE)):
            return Kind.READ
    elif first and not _MAY_BE_MILD(first):
        return Kind.WRITE
    strict = vendor not in _SEMICOLONS
    return max(
        (_statement(part, strict) for part in _statements(sql, vendor)), default=Kind.NEITHER
    )


def _is_plain(text: str, marks: tuple[str, ...]) -> bool:
    # Loops, because generators cost as much as what they loop over.
    for mark in marks:
        if mark in text:
            return False
    if "FOR" in text and _FOR.search(text):
        return False
    for part in text.split("(")[:-1]:
        if part.rstrip(' "\t\r\n\f\v').endswith(_SUSPECT_BEFORE_PARENTHESIS):
            return False
    return True


def _alters(sql: str, vendor: str) -> bool:
    if _first_word(sql) in _DATA_WORDS:
        text = sql.upper()
        for mark in _SESSION_MARKS:
            if mark in text:
                break
        else:
            # The INTO of an INSERT is no SELECT's.
            text = text.replace("INSERT INTO", "", 1)
            if vendor in _SEMICOLONS or not _SESSION_WORD.search(text):
                return False
    return any(_statement_alters(part, vendor) for part in _statements(sql, vendor))


_cached_kind = lru_cache(maxsize=1024)(_kind)
_cached_alters = lru_cache(maxsize=1024)(_alters)


def _statements(sql: str, vendor: str) -> Iterator[str]:
    """Yield the statements of every reading: upper case, no comments, an X for what is quoted."""
    ends = False
    for readings in (_READINGS[vendor],) if vendor in _READINGS else _READINGS.values():
        for reading in readings if "\\" in sql else readings[:1]:
            bare, whole = _bare(sql, reading)
            ends = ends or whole
            for part in bare.upper().split(";"):
                if text := part.strip().lstrip("( \t\r\n"):
                    yield text
    if not ends:
        yield _ANYTHING


def _bare(sql: str, reading: _Reading) -> tuple[str, bool]:
    """Return the bare words, and whether all that begins in the text also ends in it."""
    kept, at = [], 0
    while found := reading.token.search(sql, at):
        kept.append(sql[at : found.start()])
        token, at = found[0], found.end()
        if found["cut"]:
            return "".join(kept), False
        if token == "/*":
            if reading.runs and sql.startswith(("!", "M!"), at):
                kept.append(f";{_ANYTHING};")
            at = _end_of_comment(sql, at, reading.nests)
            if not at:
                return "".join(kept), False
            kept.append(" ")
        elif token.startswith(("--", "#")):
            kept.append(" ")
        else:
            # A name keeps its place as a word, and that of a function also its meaning.
            known = token[0] != "'" and _QUOTED_FUNCTION.fullmatch(token[1:-1].upper())
            kept.append(f" {known[0] if known else 'X'} ")
    kept.append(sql[at:])
    return "".join(kept), True


def _end_of_comment(sql: str, at: int, nests: bool) -> int:
    if not nests:
        end = sql.find("*/", at)
        return end + 2 if end >= 0 else 0
    depth = 1
    for edge in _EDGE_OF_COMMENT.finditer(sql, at):
        depth += 1 if edge[0] == "/*" else -1
        if not depth:
            return edge.end()
    return 0


def _statement(text: str, strict: bool) -> Kind:
    whole = text
    runs, text = _unwrapped(text)
    if not runs:
        floor = Kind.NEITHER
        if not strict:
            return floor
    elif _READ.match(text):
        floor = Kind.READ
    elif _first_word(text) == "LOCK":
        floor = Kind.LOCK
    elif (
        _LOCAL_PRAGMA_SET.match(text) or _PRAGMA_READ.match(text)
        if text.startswith("PRAGMA")
        else _NEITHER.match(text) and not (text.startswith("SET") and _FOR_ALL.search(text))
    ):
        floor = Kind.NEITHER
    else:
        return Kind.WRITE
    rest, locks = _LOCKING.subn(" ", whole)
    if (_ANY_CHANGE if strict else _CHANGE).search(rest):
        return Kind.WRITE
    return Kind.LOCK if locks else floor


def _unwrapped(text: str) -> tuple[bool, str]:
    """Return whether the statement is run at all, and it without what only wraps it."""
    if found := _SET_STATEMENT.match(text):
        text = text[found.end() :].lstrip("( \t\r\n")
    if not (found := _EXPLAIN.match(text)):
        return True, text
    text, runs = text[found.end() :], False
    if found := _OPTIONS.match(text):
        runs = any(_runs(option.split()) for option in found[1].split(","))
    elif found := _OPTION_WORDS.match(text):
        runs = bool(_ANALYZE.search(found[0]))
    if found:
        text = text[found.end() :]
    # An option that is not known may stand before the word.
    return runs or bool(_ANALYZE.search(text)), text.lstrip("( \t\r\n")


def _runs(option: list[str]) -> bool:
    # A quoted option may be any.
    name, off = option[:1], option[1:] in (["OFF"], ["FALSE"], ["0"])
    return name in (["ANALYZE"], ["ANALYSE"], ["X"]) and not off


def _statement_alters(text: str, vendor: str) -> bool:
    runs, text = _unwrapped(text)
    if not runs:
        return False
    if _SESSION.search(_TRANSACTION_CONFIG.sub(" ", text)):
        return True
    if vendor not in _SEMICOLONS and _SESSION_WORD.search(_UPDATE_SET.sub(" ", text)):
        return True
    first = _first_word(text)
    if first == "CREATE":
        return bool(_TEMPORARY.search(text))
    if first == "DECLARE":
        return not _READ.match(text) or bool(_HOLD.search(text))
    if first == "PRAGMA":
        return not _PRAGMA_READ.match(text)
    if first == "LOCK":
        return vendor != "postgresql"
    if first == "SET":
        return not _PASSING_SET[vendor].match(text) if vendor in _PASSING_SET else True
    return not _LEAVES_SESSION(first)
