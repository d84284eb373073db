"""Statements that are no text: what is classified is what the driver will send."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from django.db import DatabaseError, connection
from psycopg.sql import SQL

from pinning_middleware.backend.writes import classify, sql_text
from pinning_middleware.reasons import Fault
from pinning_middleware.servers.registry import registry
from pinning_middleware.sql import StatementKind
from tests.app.models import Tag

if sys.version_info >= (3, 14):
    from string.templatelib import Interpolation, Template
else:

    class Interpolation(NamedTuple):
        """What the package uses of a value in a template string of Python 3.14."""

        value: object
        expression: str = ""
        conversion: str | None = None
        format_spec: str = ""

    class Template:
        """What the package uses of a template string of Python 3.14."""

        def __init__(self, *parts: str | Interpolation) -> None:
            self.parts = parts

        def __iter__(self) -> Iterator[str | Interpolation]:
            return iter(self.parts)

        @property
        def interpolations(self) -> tuple[Interpolation, ...]:
            return tuple(part for part in self.parts if isinstance(part, Interpolation))


def value(of: object, format_spec: str = "") -> Interpolation:
    return Interpolation(of, "", None, format_spec)


DELETE = Template("DELETE FROM app_tag WHERE id = ", value(1), " RETURNING 1")


@pytest.mark.parametrize(
    ("template", "text", "kind"),
    [
        (Template("SELECT ", value(1), "::int"), "SELECT %s::int", StatementKind.READ),
        (Template("SELECT ", value(1, "l")), "SELECT %s", StatementKind.READ),
        (Template("SELECT ", value("id", "i")), 'SELECT "id"', StatementKind.READ),
        (
            Template("INSERT INTO ", value("app_tag", "i"), " VALUES (", value(1), ")"),
            'INSERT INTO "app_tag" VALUES (%s)',
            StatementKind.WRITE,
        ),
        (
            Template("WITH gone AS (", value(DELETE, "q"), ") SELECT 1"),
            "WITH gone AS (DELETE FROM app_tag WHERE id = %s RETURNING 1) SELECT 1",
            StatementKind.WRITE,
        ),
        (
            Template(value(SQL("SELECT 1"), "q"), " LIMIT ", value(1)),
            "SELECT 1 LIMIT %s",
            StatementKind.READ,
        ),
    ],
)
def test_template_string_is_classified_with_the_parts_it_contains(
    template: Template, text: str, kind: StatementKind
) -> None:
    assert sql_text(connection, template) == text
    assert classify(connection, template).kind is kind


@pytest.mark.parametrize("statement", [object(), None, 5])
def test_statement_of_an_unknown_type_is_a_write(statement: object) -> None:
    assert classify(connection, statement).kind is StatementKind.WRITE


def test_composed_statement_of_psycopg2_is_classified_without_a_connection() -> None:
    """As for a replica that cannot be reached, whose read another server runs."""
    sql = pytest.importorskip("psycopg2.sql")
    query = sql.SQL("SELECT {} FROM {} WHERE id = {} OR id = {}").format(
        sql.Identifier("id"),
        sql.Identifier("public", "app_book"),
        sql.Literal(1),
        sql.Placeholder(),
    )
    text = sql_text(SimpleNamespace(connection=None), query)  # type: ignore[arg-type]
    assert text == 'SELECT "id" FROM "public"."app_book" WHERE id = %s OR id = %s'


@pytest.mark.parametrize(
    ("sql", "begins", "ends"),
    [
        ("BEGIN", True, False),
        ("START TRANSACTION READ ONLY", True, False),
        ("COMMIT", False, True),
        ("ROLLBACK", False, True),
        ("SAVEPOINT a", False, False),
        ("SELECT 1", False, False),
        ("BEGIN; SELECT 1", True, False),
        ("SELECT 1; COMMIT", False, True),
        ("INSERT INTO app_tag (name) VALUES (1)", False, False),
    ],
)
def test_statement_that_begins_or_ends_a_transaction_is_recognised(
    sql: str, begins: bool, ends: bool
) -> None:
    statement = classify(connection, sql)
    assert (statement.begins_transaction, statement.ends_transaction) == (begins, ends)


@pytest.mark.django_db(transaction=True, databases="__all__")
@pytest.mark.parametrize("succeeds", [True, False])
def test_write_that_succeeds_returns_a_primary_to_the_rotation(succeeds: bool) -> None:
    endpoint = registry.endpoint("default")
    registry.mark_down(endpoint, Fault.UNREACHABLE, 1000, "by the test")
    tag = Tag.objects.create(name="a") if succeeds else None
    if tag is None:
        with pytest.raises(DatabaseError), connection.cursor() as cursor:
            cursor.execute("INSERT INTO missing VALUES (1)")
    assert (endpoint.out_of_rotation is None) == succeeds
    registry.mark_up(endpoint)
