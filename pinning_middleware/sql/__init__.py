"""
Classify SQL statements: whether they read, lock or write, and whether they alter their session.

Two layers: a lexer for each vendor removes comments and replaces quoted text, then tables of
words classify what is left. A SELECT that contains none of these words is classified without
the lexer, because applications send far more of them than of anything else.

The classification fails closed: an unrecognised statement is a write and alters its session.
Functions are not analysed: a SELECT of a function that writes is a read, unless the function is
known to `words` or in the caller's `writing_functions`. The session state that an INSERT
leaves (`lastval()`, `LAST_INSERT_ID()`) does not count as an alteration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import IntEnum

from pinning_middleware.sql import words
from pinning_middleware.sql.lexers import ALL_LEXERS, LEXERS, UNKNOWN_STATEMENT
from pinning_middleware.sql.words import WritingFunctions, contains


class StatementKind(IntEnum):
    """What a statement does to the data, in ascending order of severity."""

    NEITHER = 0  # transaction control, SET, SHOW, plain EXPLAIN
    READ = 1
    LOCK = 2  # a read that takes or releases locks
    WRITE = 3


def kind_of(
    sql: str, vendor: str = "", writing_functions: frozenset[str] = frozenset()
) -> StatementKind:
    """
    Return the kind of a statement, or the most severe kind of several statements.

    `vendor` is that of Django's connection. For a vendor other than PostgreSQL, MySQL (MariaDB)
    and SQLite, anything but a plain SELECT is a write. `writing_functions` are names in upper
    case, without a schema.
    """
    writing = words.writing_functions(writing_functions)
    first = _first_word(sql)
    if first == "SELECT":
        if _is_plain_select(_searchable(sql), vendor, writing):
            return StatementKind.READ
    elif first and first not in words.MAY_NOT_WRITE:
        return StatementKind.WRITE
    classify = _kind if vendor in LEXERS else _kind_by_unknown_vendor
    return max(
        (classify(text, writing) for text in _statements(sql, vendor, writing.names)),
        default=StatementKind.NEITHER,
    )


def alters_session(sql: str, vendor: str = "") -> bool:
    """
    Return whether the session may differ from a new one afterwards: by settings, variables,
    temporary tables, locks or prepared statements.
    """
    if _is_plain_data_statement(sql, vendor):
        return False
    alters = _alters if vendor in LEXERS else _alters_by_unknown_vendor
    return any(alters(text, vendor) for text in _statements(sql, vendor, frozenset()))


def begins_transaction(sql: str, vendor: str = "") -> bool:
    """
    Return whether a statement, or one of several, begins a transaction that none of them ends: by
    BEGIN or START TRANSACTION, or by COMMIT AND CHAIN.
    """
    if ";" not in sql and _first_word(sql) not in words.MAY_BEGIN_TRANSACTION:
        return False
    is_open = False
    for text in _statements(sql, vendor, frozenset()):
        if words.TRANSACTION_BEGIN.match(text):
            is_open = True
        elif words.TRANSACTION_END.match(text):
            is_open = False
    return is_open


def ends_transaction(sql: str, vendor: str = "") -> bool:
    """
    Return whether a statement, or one of several, ends the session's transaction: by COMMIT, END,
    ROLLBACK, ABORT or PREPARE TRANSACTION, also with AND CHAIN; on MySQL and MariaDB also by an
    implicit commit.
    """
    first = _first_word(sql)
    implicit = words.IMPLICIT_COMMITS if vendor == "mysql" else frozenset[str]()
    if (
        first
        and ";" not in sql
        and first not in words.MAY_END_TRANSACTION
        and first not in implicit
    ):
        return False
    return any(
        words.TRANSACTION_END.match(text) is not None
        or (
            _first_word(text) in implicit
            and not words.TEMPORARY.search(text)
            and not words.ANALYZE_STATEMENT.match(text)
        )
        for text in _statements(sql, vendor, frozenset())
    )


def table_of(sql: str, functions: frozenset[str] = frozenset()) -> str | None:
    """
    Return the only table that a write changes, without quotes and in lower case, with its schema
    if the statement names it. Return None if it is not obvious. ``functions``: names of functions
    that write.
    """
    if "/*" in sql or "--" in sql or len([s for s in sql.split(";") if s.strip()]) != 1:
        return None
    found = words.TARGET.match(sql)
    if found is None or found.lastgroup is None:
        return None
    # Another statement may follow, or be nested in this one.
    rest = words.UPSERT.sub(" ", sql[found.end() :].upper())
    if (
        contains(rest, words.CHANGES)
        or contains(rest, words.OTHER_STATEMENTS)
        or contains(rest, words.writing_functions(functions).calls)
    ):
        return None
    return re.sub(r'["`]', "", found[found.lastgroup]).lower()


def _first_word(text: str) -> str:
    found = words.FIRST_WORD.match(text)
    return found[1].upper() if found else ""


def _searchable(sql: str) -> str:
    """Return the text in which words are searched; long lists of parameters contain none."""
    return sql.upper().replace("%S, %S, %S, %S, ", " ")


def _is_plain_select(text: str, vendor: str, writing: WritingFunctions) -> bool:
    return not (
        ";" in text
        or contains(text, words.SELECT_MARKS)
        or contains(text, writing.mentions)
        or (
            vendor not in LEXERS
            and (contains(text, words.CHANGES) or contains(text, words.OTHER_STATEMENTS))
        )
    )


def _is_plain_data_statement(sql: str, vendor: str) -> bool:
    first = _first_word(sql)
    if first not in words.DATA_STATEMENTS or ";" in sql:
        return False
    text = _searchable(sql).replace("INSERT INTO", "", 1)
    return not (
        ":=" in text
        or contains(text, words.NAMES_SESSION)
        or contains(text, words.INTO)
        or (vendor not in LEXERS and _may_hold_another_statement(text, first))
    )


def _statements(sql: str, vendor: str, functions: frozenset[str]) -> Iterator[str]:
    """
    Yield the statements in upper case, without comments and quoted text, by each lexer that may
    apply. Yield an unknown statement if none of them finds an end to every quoted text.
    """
    known = LEXERS.get(vendor)
    lexers = (known if "\\" in sql else known[:1]) if known else ALL_LEXERS
    terminated = False
    kept = functions | words.LOCKING_FUNCTIONS | words.SESSION_FUNCTIONS
    for lexer in lexers:
        bare, complete = lexer.bare(sql, kept)
        terminated = terminated or complete
        for part in bare.upper().split(";"):
            if text := part.strip().lstrip("( \t\r\n"):
                yield text
    if not terminated:
        yield UNKNOWN_STATEMENT


def _kind(text: str, writing: WritingFunctions) -> StatementKind:
    whole = text
    executed, text = _unwrapped(text)
    if not executed:
        return StatementKind.NEITHER
    if words.READ.match(text):
        kind = StatementKind.READ
    elif _first_word(text) == "LOCK":
        kind = StatementKind.LOCK
    elif (
        words.LOCAL_PRAGMA_SET.match(text) or words.PRAGMA_READ.match(text)
        if text.startswith("PRAGMA")
        else words.NO_DATA_ACCESS.match(text)
        and not (text.startswith("SET") and words.PERSISTENT_SET.search(text))
    ):
        kind = StatementKind.NEITHER
    else:
        return StatementKind.WRITE
    return max(kind, _effect(whole, writing))


def _effect(text: str, writing: WritingFunctions) -> StatementKind:
    """Return the most severe effect that a word anywhere in the statement has."""
    rest, clauses = words.LOCKING_CLAUSE.subn(" ", text)
    if contains(rest, words.CHANGES) or contains(rest, writing.calls):
        return StatementKind.WRITE
    return (
        StatementKind.LOCK if clauses or contains(rest, words.CALLS_LOCK) else StatementKind.NEITHER
    )


def _kind_by_unknown_vendor(text: str, writing: WritingFunctions) -> StatementKind:
    if words.TRANSACTION_CONTROL.fullmatch(text):
        return StatementKind.NEITHER
    if _first_word(text) != "SELECT" or contains(text, words.OTHER_STATEMENTS):
        return StatementKind.WRITE
    return max(StatementKind.READ, _effect(text, writing))


def _unwrapped(text: str) -> tuple[bool, str]:
    """Return whether the statement is executed at all, and what EXPLAIN or SET STATEMENT wraps."""
    if found := words.SET_STATEMENT.match(text):
        text = text[found.end() :].lstrip("( \t\r\n")
    if found := words.ANALYZE_STATEMENT.match(text):
        return True, text[found.end() :].lstrip("( \t\r\n")
    if not (found := words.EXPLAIN.match(text)):
        return True, text
    text, executed = text[found.end() :], False
    if found := words.OPTIONS.match(text):
        executed = any(_executes(option.split()) for option in found[1].split(","))
    elif found := words.OPTION_WORDS.match(text):
        executed = bool(words.ANALYZE.search(found[0]))
    if found:
        text = text[found.end() :]
    # An unknown option may precede the word.
    return executed or bool(words.ANALYZE.search(text)), text.lstrip("( \t\r\n")


def _executes(option: list[str]) -> bool:
    # X is a quoted option, which may be any; so may one with Unicode escapes.
    name, off = option[:1], option[1:] in (["OFF"], ["FALSE"], ["0"])
    return name in (["ANALYZE"], ["ANALYSE"], ["X"], ["U&"]) and not off


def _alters(text: str, vendor: str) -> bool:
    executed, text = _unwrapped(text)
    if not executed:
        # MySQL may store the plan in a variable.
        return vendor == "mysql" and bool(words.SESSION_TARGET.search(text))
    if (
        contains(words.TRANSACTION_CONFIG.sub(" ", text), words.CALLS_SESSION)
        or words.SESSION_TARGET.search(text)
        or (vendor == "mysql" and ":=" in text)
    ):
        return True
    first = _first_word(text)
    if first == "CREATE":
        return bool(words.TEMPORARY.search(text))
    if first == "DECLARE":
        return not words.READ.match(text) or bool(words.HOLD.search(text))
    if first == "PRAGMA":
        # SQLite's schema editor sets foreign_keys, which changes no row that a read returns.
        is_local = words.LOCAL_PRAGMA_SET.match(text) and "CASE_SENSITIVE_LIKE" not in text
        return not (is_local or words.PRAGMA_READ.match(text))
    if first == "LOCK":
        return vendor != "postgresql"
    if first == "SET":
        return vendor not in words.TRANSACTION_SET or not words.TRANSACTION_SET[vendor].match(text)
    return first not in words.KEEPS_SESSION


def _alters_by_unknown_vendor(text: str, vendor: str) -> bool:
    if words.TRANSACTION_CONTROL.fullmatch(text):
        return False
    first = _first_word(text)
    return (
        first not in words.DATA_STATEMENTS
        or (first == "SELECT" and contains(text, words.INTO))
        or _may_hold_another_statement(text, first)
    )


def _may_hold_another_statement(text: str, first: str) -> bool:
    # An UPDATE has a SET of its own.
    own = first in ("UPDATE", "MERGE")
    return contains(text, words.OTHER_STATEMENTS) or len(words.SET_WORD.findall(text)) > own
