"""
Collect the statements that Django's own tests and psycopg send, in `sql_corpus.txt`:

    python -m tests.sql_corpus

Of the statements that differ in names and values only, the shortest is kept, with one column or
parameter in place of several. The file has one
statement a line: the vendor, a tab, and the statement as JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from sample_site.cluster import Cluster
from tests.other_suites.comparison import ROOT
from tests.other_suites.django import sources
from tests.real.layouts.versions import NEWEST, installation
from tests.real.mariadb import running_servers

CORPUS: Final = Path(__file__).with_suffix(".txt")
# Bytes of the statements of one vendor.
MAX_BYTES: Final = 100_000
LABELS: Final = (
    "aggregation aggregation_regress annotations backends bulk_create composite_pk constraints "
    "contenttypes_tests custom_pk dates db_functions delete distinct_on_fields expressions "
    "expressions_case expressions_window from_db_value generic_relations get_or_create indexes "
    "inspectdb introspection known_related_objects lookup m2m_through many_to_many "
    "migrate_signals migrations model_fields model_inheritance null_queries one_to_one "
    "or_lookups ordering postgres_tests prefetch_related queries queryset_pickle raw_query "
    "reserved_names schema select_for_update select_related sessions_tests sites_tests "
    "test_runner transactions update update_only_fields "
)
# Placed in front of runtests.py.
RECORDER: Final = """
import json
from django.db.backends.utils import CursorWrapper

recorded = set()

def recording(method):
    def execute(self, sql, *args):
        text = sql if isinstance(sql, str) else getattr(sql, "as_string", str)(self.db.connection)
        line = json.dumps([self.db.vendor, text])
        if line not in recorded:
            recorded.add(line)
            with open("statements.txt", "a") as file:
                file.write(line + "\\n")
        return method(self, sql, *args)
    return execute

for name in ("_execute", "_executemany"):
    setattr(CursorWrapper, name, recording(getattr(CursorWrapper, name)))

"""
PLAIN: Final = """
from test_sqlite import *
DATABASES = {databases!r}
"""
_QUERY: Final = re.compile(r'\tF\t\d+\t(?:Query\t |Parse\t "\w*" )"(.*)"[ \d]*$', re.DOTALL)
_COLUMN: Final = r"""["`]\w+["`](?:\.["`]\w+["`])?(?: AS ["`]\w+["`])?"""
_SHAPE: Final = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\b[a-z_]\w*\b|\d+")


def shape(sql: str) -> str:
    """Return a statement without names and values."""
    bare = re.sub(r"x(?:\.x)+", "x", _SHAPE.sub("x", sql))
    return re.sub(r"(x|%s)(?:, \1)+", r"\1", bare)


def shortened(sql: str) -> str:
    """Return a statement with a single one of several columns or parameters, on one line."""
    sql = sql if "--" in sql else re.sub(r"\s+", " ", sql.strip())
    item = rf"(?:{_COLUMN}|%s)"
    return re.sub(rf"({item})(?:, {item})+(?=[,)]| FROM\b|$)", r"\1", sql)


def reduced(statements: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the shortest statement of each shape, of each vendor as many as there is room for."""
    shortest: dict[tuple[str, str], str] = {}
    for vendor, sql in statements:
        text = shortened(sql)
        key = vendor, shape(text)
        shortest[key] = min(shortest.get(key, text), text, key=len)
    kept, left = [], dict.fromkeys({vendor for vendor, _ in shortest}, MAX_BYTES)
    for (vendor, _), sql in sorted(shortest.items(), key=lambda one: (len(one[1]), one)):
        left[vendor] -= len(f"{vendor}\t{json.dumps(sql)}\n")
        if left[vendor] >= 0:
            kept.append((vendor, sql))
    return sorted(kept)


def of_django(tests: Path, databases: dict[str, object]) -> Iterator[tuple[str, str]]:
    (tests / "recorded.py").write_text(RECORDER + (tests / "runtests.py").read_text())
    (tests / "settings_recorded.py").write_text(PLAIN.format(databases=databases))
    (tests / "statements.txt").write_text("")
    command = [sys.executable, "recorded.py", "--settings=settings_recorded", "--noinput"]
    subprocess.run([*command, "--parallel=1", *LABELS.split()], cwd=tests, check=False)
    for line in (tests / "statements.txt").read_text().splitlines():
        vendor, sql = json.loads(line)
        yield vendor, sql


def of_psycopg(url: str) -> Iterator[tuple[str, str]]:
    """Yield what psycopg sends by itself, from the trace of libpq."""
    import psycopg
    from psycopg.types.composite import CompositeInfo
    from psycopg.types.enum import EnumInfo
    from psycopg.types.range import RangeInfo

    with tempfile.TemporaryFile("w+") as trace, psycopg.connect(url) as connection:
        connection.pgconn.trace(trace.fileno())
        connection.execute("CREATE TABLE traced (id int, name text)")
        connection.commit()
        with connection.cursor() as cursor:
            with cursor.copy("COPY traced (id, name) FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types(["int4", "text"])
                copy.write_row((1, "a"))
            with cursor.copy("COPY (SELECT * FROM traced) TO STDOUT") as copy:
                list(copy.rows())
            with cursor.copy("COPY traced TO STDOUT WITH (FORMAT csv, HEADER)") as copy:
                list(copy)
            cursor.executemany("INSERT INTO traced VALUES (%s, %s)", [(2, "b"), (3, "c")])
            for _ in range(3):
                cursor.execute("SELECT * FROM traced WHERE id = %s", (1,), prepare=True)
        connection.commit()
        for is_scrollable in (None, False, True):
            for with_hold in (False, True):
                with connection.cursor(
                    "a cursor", scrollable=is_scrollable, withhold=with_hold
                ) as named:
                    named.execute("SELECT * FROM traced WHERE id > %s", (0,))
                    named.fetchone()
                    named.fetchmany(1)
                    named.fetchall()
                    if is_scrollable:
                        named.scroll(0, mode="absolute")
                        named.scroll(1)
                connection.commit()
        with connection.transaction(), connection.transaction():
            connection.execute("UPDATE traced SET name = name")
        with connection.transaction(force_rollback=True), connection.transaction("named"):
            connection.execute("DELETE FROM traced")
        for info in (CompositeInfo, EnumInfo, RangeInfo, psycopg.types.TypeInfo):
            info.fetch(connection, "text")
        connection.rollback()
        for level in psycopg.IsolationLevel:
            connection.isolation_level = level
            connection.read_only = connection.deferrable = level % 2 == 0
            with connection.pipeline():
                connection.execute("SELECT 1")
            connection.rollback()
        connection.isolation_level = connection.read_only = connection.deferrable = None
        connection.autocommit = True
        connection.execute("LISTEN somewhere")
        connection.execute("NOTIFY somewhere, 'a payload'")
        connection.execute("DROP TABLE traced")
        connection.execute("DEALLOCATE ALL")
        connection.pgconn.untrace()
        trace.seek(0)
        for message in re.split(r"\n(?=\d{4}-\d\d-)", trace.read()):
            if found := _QUERY.search(message):
                yield "postgresql", found[1]


def main() -> None:
    found: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="sql-corpus-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        tests = sources(folder)
        # The wheel of PostgreSQL has neither ICU nor the contrib modules.
        path = installation(NEWEST)
        with Cluster(folder / "cluster", 0, keep=False, installation=path) as cluster:
            cluster.create_database("traced")
            found += of_psycopg(cluster.url("primary", "traced"))
            aliases = {"default": "first", "other": "second"}
            for database in aliases.values():
                cluster.create_database(database)
            found += of_django(
                tests, {a: cluster.database("primary", name) for a, name in aliases.items()}
            )
        sqlite = {"ENGINE": "django.db.backends.sqlite3"}
        found += of_django(tests, {"default": sqlite, "other": sqlite})
        with running_servers() as servers:
            entry = servers.entries()["my"] | {"USER": "root", "PASSWORD": ""}
            entry |= {"HOST": str(servers["my"].socket)}
            entry["TEST"] = {"CHARSET": "utf8mb4"}
            found += of_django(tests, {a: {**entry, "NAME": a} for a in ("default", "other")})
    with CORPUS.open("w") as file:
        for vendor, sql in reduced(found):
            file.write(f"{vendor}\t{json.dumps(sql)}\n")
    print(CORPUS.relative_to(ROOT), CORPUS.stat().st_size)


if __name__ == "__main__":
    main()
