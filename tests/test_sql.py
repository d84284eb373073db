from __future__ import annotations

import pytest

from pinning_middleware.sql import Kind, kind_of, table_of

NEITHER, READ, LOCK, WRITE = Kind
VENDORS = ("postgresql", "mysql", "sqlite", "oracle", "")

NEITHERS = """
;
BEGIN
begin work
BEGIN IMMEDIATE
BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE, NOT DEFERRABLE
BEGIN; COMMIT
START TRANSACTION
START TRANSACTION WITH CONSISTENT SNAPSHOT
COMMIT
COMMIT AND NO CHAIN
ROLLBACK
ROLLBACK TO SAVEPOINT "s1"
END
ABORT
SAVEPOINT s1
RELEASE SAVEPOINT s1
SET search_path TO other
SET TIME ZONE 'UTC'
SET SESSION TRANSACTION READ ONLY
SET @x = 5
RESET ALL
SHOW server_version
SHOW TABLES
PRAGMA foreign_keys = ON
USE other
EXPLAIN SELECT 1
EXPLAIN DELETE FROM t
EXPLAIN (FORMAT JSON, VERBOSE) UPDATE t SET a = 1
EXPLAIN FORMAT=JSON DELETE FROM t
EXPLAIN QUERY PLAN SELECT 1
DESCRIBE t
FETCH 10 FROM c
CLOSE c
UNLOCK TABLES
DISCARD ALL
-- nothing but a comment
/* nothing but a comment */
"""

READS = """
SELECT 1
  select * from t
(SELECT 1) UNION (SELECT 2)
((SELECT 1))
SELECT * FROM t WHERE a = 'INSERT INTO t; DELETE FROM t'
SELECT 'a;b'; SELECT 2
SELECT "insert", "into", "for update" FROM "delete"
SELECT 'it''s; DELETE FROM t'
SELECT 1 -- DELETE FROM t
SELECT /* INSERT INTO t */ 1
/* route: home; */ SELECT 1
SELECT 1;
BEGIN; SELECT 1; COMMIT
SELECT updated, inserted_at, for_sale, deleted, information FROM t
SELECT locked FROM t
SELECT substring(a FROM 1 FOR 2) FROM t
WITH x AS (SELECT 1) SELECT * FROM x
WITH RECURSIVE x AS (SELECT 1 UNION ALL SELECT a FROM x) SELECT * FROM x
VALUES (1), (2)
TABLE t
EXPLAIN ANALYZE SELECT 1
EXPLAIN (ANALYZE, FORMAT JSON) SELECT 1
EXPLAIN ANALYSE VERBOSE WITH x AS (SELECT 1) SELECT * FROM x
DECLARE c CURSOR FOR SELECT 1
DECLARE "c" NO SCROLL CURSOR WITH HOLD FOR SELECT 1
COPY t TO STDOUT
COPY (SELECT a FROM t WHERE b = 'FROM') TO STDOUT
COPY t (a, b) TO STDOUT WITH (FORMAT csv)
SET STATEMENT max_statement_time=1 FOR SELECT 1
"""

LOCKS = """
SELECT * FROM t FOR UPDATE
select * from t for update nowait
SELECT * FROM t FOR NO KEY UPDATE OF t SKIP LOCKED
SELECT * FROM t FOR SHARE
SELECT * FROM t FOR KEY SHARE
SELECT * FROM t LOCK IN SHARE MODE
SELECT * FROM t WHERE (a = 1)FOR UPDATE
SELECT * FROM t WHERE a = 'x'FOR UPDATE
SELECT * FROM "t"FOR UPDATE
SELECT * FROM t FOR/**/UPDATE
SELECT * FROM (SELECT * FROM t FOR UPDATE) s
WITH x AS (SELECT 1) SELECT * FROM t FOR UPDATE
SET STATEMENT max_statement_time=1 FOR SELECT 1 FOR UPDATE
SELECT 1; SELECT 2 FOR UPDATE; COMMIT
LOCK TABLE t IN SHARE MODE
LOCK TABLES t WRITE
"""

WRITES = r"""
INSERT INTO t VALUES (1)
insert into t values (1)
UPDATE t SET a = 1
DELETE FROM t
MERGE INTO t USING s ON t.a = s.a WHEN MATCHED THEN DELETE
REPLACE INTO t VALUES (1)
TRUNCATE t
CREATE TABLE t (a int)
ALTER TABLE t ADD b int
DROP TABLE t
REFRESH MATERIALIZED VIEW v
VACUUM
REINDEX
GRANT ALL ON t TO u
CALL p()
DO $$ BEGIN DELETE FROM t; END $$
EXECUTE prepared(1)
PREPARE p AS DELETE FROM t
NOTIFY channel
COMMIT PREPARED 'x'
ANALYZE t
ANALYZE SELECT 1
LOAD DATA INFILE 'x' INTO TABLE t
UNKNOWN WORDS
?
(DELETE FROM t)
SELECT * INTO t2 FROM t
SELECT 1 INTO OUTFILE 'x'
SELECT 1; DELETE FROM t
SELECT ';'; DELETE FROM t
SELECT 1;DELETE FROM t;COMMIT
BEGIN; UPDATE t SET a = 1; COMMIT
SET a = 1; INSERT INTO t VALUES (1)
/* a comment first */ DELETE FROM t
-- a comment first\nDELETE FROM t
SELECT 1 -- a comment\n; DELETE FROM t
SELECT '--'; DELETE FROM t
SELECT '/*'; DELETE FROM t; SELECT '*/'
SELECT "'"; DELETE FROM t; SELECT "'"
/*! DELETE FROM t */
SELECT 1 /*!50000 ; DELETE FROM t */
/* /* */ DELETE FROM t /* */ */
WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x
WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x
WITH x AS (UPDATE t SET a = 1 RETURNING *) SELECT * FROM x
WITH x AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM x
WITH x AS (SELECT 1) UPDATE t SET a = 1
WITH x AS (SELECT * FROM t FOR UPDATE) DELETE FROM t USING x
WITH "select" AS (MERGE INTO t USING s ON true WHEN MATCHED THEN DELETE RETURNING *) TABLE "select"
EXPLAIN ANALYZE DELETE FROM t
EXPLAIN (ANALYZE) INSERT INTO t VALUES (1)
EXPLAIN (VERBOSE, ANALYZE true) UPDATE t SET a = 1
EXPLAIN/**/ANALYZE/**/DELETE FROM t
EXPLAIN ANALYZE WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x
EXPLAIN ANALYZE CREATE TABLE t2 AS SELECT 1
EXPLAIN ANALYZE EXECUTE prepared(1)
EXPLAIN (ANALYZE) REFRESH MATERIALIZED VIEW v
EXPLAIN UNHEARD_OF ANALYZE DELETE FROM t
DESC ANALYZE DELETE FROM t
DESCRIBE ANALYZE UPDATE t SET a = 1
COPY t FROM STDIN
COPY t (a, b) FROM '/tmp/x' WITH (FORMAT csv)
COPY (DELETE FROM t RETURNING *) TO STDOUT
COPY t FROM PROGRAM 'echo TO'
COPY "to" FROM STDIN
DECLARE c CURSOR FOR WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x
DECLARE BEGIN p(1); END
BEGIN p(1); END
BEGIN work.p(1); END
BEGIN NOT ATOMIC DELETE FROM t; END
BEGIN NOT ATOMIC CALL p(); END
SET STATEMENT max_statement_time=1 FOR DELETE FROM t
SET STATEMENT max_statement_time=1 FOR UPDATE t SET a = 1
SET STATEMENT max_statement_time=1 FOR INSERT t VALUES (1)
SET STATEMENT max_statement_time=1 FOR REPLACE t VALUES (1)
SET STATEMENT max_statement_time=1 FOR TRUNCATE t
SET STATEMENT max_statement_time=1 FOR CALL p()
SET STATEMENT a='FOR SELECT' FOR DROP TABLE t
"""


def lines(text: str) -> list[str]:
    return [line.replace("\\n", "\n") for line in text.strip().splitlines()]


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        (sql, kind)
        for kind, several in ((NEITHER, NEITHERS), (READ, READS), (LOCK, LOCKS), (WRITE, WRITES))
        for sql in lines(several)
    ],
)
def test_kinds(sql: str, kind: Kind, vendor: str) -> None:
    assert kind_of(sql, vendor) == kind
    assert kind_of(sql.lower(), vendor) == kind_of(sql.upper(), vendor) == kind
    assert kind_of(f"\n\t{sql}\n", vendor) == kind


@pytest.mark.parametrize(
    ("vendor", "sql"),
    [
        # Dollar quotes: their tags know upper from lower case, and may be any letter.
        ("postgresql", "SELECT $a$ ' $a$; DELETE FROM t; SELECT ' '"),
        ("postgresql", "SELECT $a$ $A$ ' $a$; DELETE FROM t; SELECT 'x'"),
        ("postgresql", "SELECT $é$ ' $é$; DELETE FROM t; SELECT ' '"),
        # A dollar inside of a name begins nothing.
        ("postgresql", "SELECT 1 AS a$b$; DELETE FROM t; SELECT 1 AS c$b$"),
        ("postgresql", "SELECT 1 AS é$b$; DELETE FROM t; SELECT 1 AS c$b$"),
        # A backslash escapes in E'' always, elsewhere where a setting says so.
        ("postgresql", r"SELECT E'\'', '\'; DELETE FROM t; --'"),
        ("postgresql", r"SELECT '\'; DELETE FROM t; --'"),
        ("postgresql", r"SELECT '\'', '; DELETE FROM t; --'"),
        # A comment ends at a carriage return, too.
        ("postgresql", "SELECT 1; --\rDELETE FROM t"),
        ("mysql", r"SELECT '\'; DELETE FROM t; -- '"),
        ("mysql", r"SELECT '\'', '; DELETE FROM t; -- '"),
        ("mysql", r'SELECT "\"", "; DELETE FROM t; -- "'),
        ("mysql", "SELECT 1 # it's\n; DELETE FROM t WHERE a = 'x'"),
        # Two minus signs with no blank behind are two minus signs.
        ("mysql", "SELECT 5--1; DELETE FROM t"),
        ("mysql", "WITH x AS (SELECT 5--1) DELETE FROM t"),
        ("mysql", "/*M!100100 DELETE FROM t */"),
        ("mysql", "SELECT 1 AS $$; DELETE FROM t; SELECT 1 AS $$"),
        ("mysql", "SELECT 1 AS `'`; DELETE FROM t; SELECT 1 AS `'`"),
        ("sqlite", "SELECT 1 AS [']; DELETE FROM t; SELECT 'x'"),
        ("sqlite", "SELECT 1 AS `'`; DELETE FROM t; SELECT 1 AS `'`"),
        ("sqlite", "SELECT '\\'; DELETE FROM t; --'"),
        ("sqlite", "SELECT 1 AS $$; DELETE FROM t; SELECT 1 AS $$"),
    ],
)
def test_what_another_database_takes_for_quoted(vendor: str, sql: str) -> None:
    """Nothing is hidden by quotes and comments that this database knows otherwise."""
    assert kind_of(sql, vendor) == WRITE
    assert kind_of(sql) == WRITE, "nor where the database is not known"


@pytest.mark.parametrize(
    ("vendor", "sql"),
    [
        ("postgresql", "SELECT $$; DELETE FROM t; $$"),
        ("postgresql", "SELECT $tag$ $$ ; DELETE FROM t; ' $tag$"),
        ("postgresql", "SELECT 1 --delete me later; update"),
        ("postgresql", r"SELECT E'it\'s; DELETE FROM t'"),
        ("postgresql", "SELECT a #>> '{update;}' FROM t"),
        ("mysql", "SELECT 1 # delete me later; update"),
        ("mysql", "SELECT 'it\\'s'; SELECT 1"),
        ("mysql", 'SELECT "; DELETE FROM t"'),
        ("mysql", "SELECT `update` FROM `into; delete`; SELECT 1"),
        ("sqlite", "SELECT `update` FROM `into; delete`; SELECT 1"),
        ("sqlite", "SELECT [update; delete] FROM t; SELECT 1"),
        ("sqlite", "SELECT 1 --delete me later; update"),
    ],
)
def test_what_this_database_takes_for_quoted(vendor: str, sql: str) -> None:
    """What stands in a quote or comment of this database makes no read a write."""
    assert kind_of(sql, vendor) == READ


def test_a_long_explain_is_recognised_at_once() -> None:
    """Names with underscores and numbers once took a time that doubled with each."""
    columns = ", ".join(f"a_{number}_b" for number in range(1000, 1500))
    assert kind_of(f"EXPLAIN SELECT {columns} FROM t") == NEITHER
    assert kind_of(f"EXPLAIN ANALYZE DELETE FROM t WHERE x IN ({columns})") == WRITE


@pytest.mark.parametrize("length", [10, 100_000])
def test_statements_of_any_length(length: int) -> None:
    """Those too long to be remembered are judged by the same rules."""
    names = "a, " * length + "a"
    assert kind_of(f"SELECT {names} FROM t") == READ
    assert kind_of(f"SELECT {names} FROM t FOR UPDATE") == LOCK
    assert kind_of(f"SELECT {names} FROM t; DELETE FROM t") == WRITE


@pytest.mark.parametrize(
    ("sql", "table"),
    [
        ("INSERT INTO t VALUES (1)", "t"),
        ('INSERT INTO "T" ("a") VALUES (%s)', "t"),
        ("INSERT OR REPLACE INTO t VALUES (1)", "t"),
        ("INSERT IGNORE INTO `t` VALUES (1)", "t"),
        ("REPLACE INTO t VALUES (1)", "t"),
        ('INSERT INTO "s"."t" VALUES (1)', "s.t"),
        ('  update "t" set a = 1', "t"),
        ("UPDATE ONLY t SET a = 1", "t"),
        ('DELETE FROM "t" WHERE a = 1', "t"),
        ("DELETE FROM t", "t"),
        ("DELETE FROM t;", "t"),
        ("DELETE FROM t RETURNING a", "t"),
        ("TRUNCATE TABLE t", "t"),
        # More than one table, or not plain to see.
        ("UPDATE t, u SET t.a = 1", None),
        ("UPDATE t JOIN u ON true SET u.a = 1", None),
        ("UPDATE t AS x SET a = 1", None),
        ("DELETE t, u FROM t JOIN u", None),
        ("DELETE FROM t USING u WHERE true", None),
        ("TRUNCATE t, u", None),
        ("TRUNCATE t CASCADE", None),
        ("DELETE FROM t; DELETE FROM u", None),
        ("DELETE /* t */ FROM u", None),
        ("DELETE FROM t -- u", None),
        ("WITH x AS (DELETE FROM u RETURNING *) INSERT INTO t SELECT * FROM x", None),
        ("MERGE INTO t USING u ON true WHEN MATCHED THEN DELETE", None),
        ("CALL t()", None),
        ("ALTER TABLE t ADD a int", None),
        ("SELECT 1", None),
        ("", None),
    ],
)
def test_the_one_table_of_a_write(sql: str, table: str | None) -> None:
    assert table_of(sql) == table
