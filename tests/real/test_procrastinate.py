"""procrastinate defers a job by a SELECT of a function that writes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import override_settings

from pinning_middleware import is_pinned

from .conftest import PostgreSQL, position_in, unrelated_scope
from .layouts import missing

pytestmark = pytest.mark.real


@pytest.fixture
def app(own_pg: PostgreSQL) -> Iterator[Any]:
    if importlib.util.find_spec("procrastinate") is None:
        missing("procrastinate is missing: pip install procrastinate")
    import procrastinate
    from procrastinate.contrib.django.django_connector import DjangoConnector

    app = procrastinate.App(connector=DjangoConnector(alias="pg"))
    own_pg["pg"].execute(app.schema_manager.get_schema(), database="site")
    own_pg.wait_for()
    with app.open():
        yield app


@pytest.mark.parametrize("is_named", [True, False])
def test_deferred_job_pins_if_its_function_is_named(app: Any, is_named: bool) -> None:
    names = ["procrastinate_defer_jobs_v1"] if is_named else []
    with override_settings(PINNING_WRITING_FUNCTIONS=names), unrelated_scope() as scope:
        app.configure_task("shop.tasks.pack").defer(order=1)
        assert is_pinned("pg") is is_named
    if is_named:
        assert position_in(scope.token)
