"""
Classification of the statements that Django and psycopg send (`sql_corpus.txt`), with the parser of
PostgreSQL as the judge, and sqlglot for those of MariaDB and SQLite that it does not know.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Final

import pglast
import sqlglot
from hypothesis import given
from hypothesis import strategies as st
from sqlglot import exp

from pinning_middleware.sql import (
    StatementKind,
    alters_session,
    begins_transaction,
    ends_transaction,
    kind_of,
)
from tests.test_sql import kind_by_grammar

Statement = tuple[str, str]
CORPUS: Final[list[Statement]] = [
    (vendor, json.loads(text))
    for vendor, _, text in (
        line.partition("\t")
        for line in Path(__file__).with_name("sql_corpus.txt").read_text().splitlines()
    )
]
_PARAMETER: Final = re.compile(r"%\(?\w*\)?s")
CHANGES: Final = (
    *(exp.Insert, exp.Update, exp.Delete, exp.Merge, exp.LoadData, exp.Into, exp.TruncateTable),
    *(exp.Create, exp.Drop, exp.Alter),
)


def judged(statement: Statement) -> StatementKind | None:
    """Return the kind by a grammar, None if none knows the statement."""
    vendor, sql = statement
    of_postgresql = _PARAMETER.sub("$1", sql).replace("%%", "%")
    if vendor == "mysql":
        of_postgresql = of_postgresql.replace("`", '"')
    try:
        return kind_by_grammar(of_postgresql)
    except pglast.parser.ParseError:
        return None if vendor == "postgresql" else kind_by_sqlglot(vendor, sql)


def kind_by_sqlglot(vendor: str, sql: str) -> StatementKind | None:
    bare = _PARAMETER.sub("?", sql).replace("%%", "%")
    try:
        trees = [tree for tree in sqlglot.parse(bare, dialect=vendor) if tree is not None]
    except sqlglot.errors.SqlglotError:
        return None
    # What it does not parse, and statements that may only explain another one.
    if any(isinstance(tree, (exp.Command, exp.Describe, exp.Analyze)) for tree in trees):
        return None
    return max(map(kind_of_tree, trees), default=StatementKind.NEITHER)


def kind_of_tree(tree: exp.Expr) -> StatementKind:
    if tree.find(*CHANGES):
        return StatementKind.WRITE
    if tree.find(exp.Lock):
        return StatementKind.LOCK
    return StatementKind.READ if tree.find(exp.Select) else StatementKind.NEITHER


@cache
def judged_corpus() -> dict[Statement, StatementKind]:
    kinds = ((statement, judged(statement)) for statement in CORPUS)
    return {statement: kind for statement, kind in kinds if kind is not None}


def test_corpus_is_large_and_mostly_known_to_the_judge() -> None:
    vendors = [vendor for vendor, _ in judged_corpus()]
    assert len(CORPUS) > 2000
    for vendor, least in (("postgresql", 0.99), ("sqlite", 0.97), ("mysql", 0.94)):
        of_vendor = [statement for statement in CORPUS if statement[0] == vendor]
        assert vendors.count(vendor) > least * len(of_vendor)
    kinds = list(judged_corpus().values())
    assert (
        min(
            kinds.count(kind)
            for kind in (StatementKind.NEITHER, StatementKind.READ, StatementKind.WRITE)
        )
        > 40
    )


def test_no_statement_of_the_corpus_is_less_severe_than_by_a_grammar() -> None:
    assert [
        (vendor, sql, kind)
        for (vendor, sql), kind in judged_corpus().items()
        if kind_of(sql, vendor) < kind
    ] == []


def test_statement_that_the_judge_does_not_know_is_a_read_only_by_its_first_word() -> None:
    unknown = [one for one in CORPUS if one not in judged_corpus()]
    reads = [
        sql
        for vendor, sql in unknown
        if kind_of(sql, vendor) in (StatementKind.READ, StatementKind.LOCK)
    ]
    # ANALYZE: MariaDB's, of a SELECT.
    first_words = {sql.split()[0].strip("(") for sql in reads}
    assert first_words <= {"SELECT", "WITH", "ANALYZE"}


def test_fewer_than_one_in_a_thousand_reads_of_the_corpus_is_taken_for_a_write() -> None:
    false_writes = [
        statement
        for statement, kind in judged_corpus().items()
        if kind < StatementKind.WRITE and kind_of(statement[1], statement[0]) is StatementKind.WRITE
    ]
    print(*false_writes, sep="\n")
    assert len(false_writes) < len(CORPUS) / 1000, false_writes


TEMPLATES: Final = """
{a}; {b}
WITH x AS ({b}) {a}
WITH x AS ({b} RETURNING 1) {a}
WITH x AS (WITH y AS ({b} RETURNING 1) SELECT * FROM y) {a}
SELECT * FROM (WITH x AS ({b} RETURNING 1) {a}) AS y
EXPLAIN {b}
EXPLAIN ANALYZE {b}
EXPLAIN (VERBOSE, ANALYZE) {b}
EXPLAIN (ANALYZE, ANALYZE off) {b}
COPY ({b}) TO STDOUT
COPY ({b} RETURNING 1) TO STDOUT
DECLARE c CURSOR FOR {b}
PREPARE p AS {b}
CREATE TABLE y AS {b}
INSERT INTO y {b}
{a} UNION ALL ({a})
{a} /* {b} */
{a} -- {b}
SELECT 1 INTO y FROM ({b}) AS z
SELECT * FROM ({b}) AS z FOR UPDATE
""".strip().splitlines()
OF_POSTGRESQL: Final = [
    sql
    for vendor, sql in CORPUS
    if vendor == "postgresql" and "--" not in sql and not sql.endswith(";")
]
READS: Final = [sql for sql in OF_POSTGRESQL if sql.startswith("SELECT")]


@given(st.integers())
def test_no_combined_statement_is_less_severe_than_by_the_parser_of_postgresql(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(20):
        template = generator.choice(TEMPLATES)
        sql = template.format(a=generator.choice(READS), b=generator.choice(OF_POSTGRESQL))
        if (kind := judged(("postgresql", sql))) is not None:
            assert kind_of(sql, "postgresql") >= kind, sql


# What changes no meaning

_TOKEN: Final = re.compile(
    r"""'(?:[^']|'')*' | "[^"]*" | `[^`]*` | %\(?\w*\)?s
    | [@:$]*\w[\w$]* | [-+<>=!|&@#~*/^?%:]+ | [^\s]""",
    re.VERBOSE,
)
# What each vendor takes for a comment or white space, and for a string.
GAPS: Final = {
    "postgresql": [" ", "\n", "\t\r\n", "/* x */", "/* ; /* DELETE */ ' */", "-- INTO 'x\n"],
    "mysql": [" ", "\n", "\t\r\n", "/* x */", "/* ; DELETE ' */", "-- INTO 'x\n", "# FOR UPDATE\n"],
    "sqlite": [" ", "\n", "\t\r\n", "/* x */", "/* ; DELETE ' */", "-- INTO 'x\n"],
}
LITERALS: Final = {
    "postgresql": ["'; DELETE FROM t --'", "$$' INTO $$", r"E'\'; UPDATE'", "'it''s'", "U&'x;'"],
    "mysql": ["'; DELETE FROM t -- '", '"; INTO"', r"'\\; UPDATE'", "'it''s'"],
    "sqlite": ["'; DELETE FROM t --'", "'/* INTO '", "'it''s'"],
}
PLAIN: Final = [one for one in CORPUS if not re.search(r"--|/\*|\\|\$\$|[eE]'|&'", one[1])]


def disguised(sql: str, vendor: str, generator: random.Random) -> str:
    """Return the statement with other white space, comments, case and literals."""
    parts, end = [], 0
    for found in _TOKEN.finditer(sql):
        token = found[0]
        if found.start() > end or (generator.random() < 0.2 and token not in ".("):
            parts.append(generator.choice(GAPS[vendor]) if end else "")
        if token[0] == "'" or _PARAMETER.fullmatch(token):
            token = generator.choice([token, *LITERALS[vendor]])
        elif token.isalpha():
            token = generator.choice([token, token.upper(), token.lower(), token.title()])
        parts.append(token)
        end = found.end()
    return "".join(parts)


def classified(sql: str, vendor: str) -> tuple[StatementKind, bool, bool, bool]:
    functions = alters_session, begins_transaction, ends_transaction
    return kind_of(sql, vendor), *(function(sql, vendor) for function in functions)


@given(st.integers())
def test_comments_white_space_case_and_literals_do_not_change_the_classification(seed: int) -> None:
    generator = random.Random(seed)
    for vendor, sql in generator.choices(PLAIN, k=20):
        changed = disguised(sql, vendor, generator)
        assert classified(changed, vendor) == classified(sql, vendor), changed
