from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connections
from django.test import override_settings

from sample_site.cluster import Cluster

ALIASES = {"pg": "primary", "pg1": "replica1", "pg2": "replica2"}


class OnPostgreSQL:
    """Every model lives on the primary `pg`."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "pg"

    db_for_write = db_for_read


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A primary and two streaming replicas, for all tests of this folder."""
    folder: Path = tmp_path_factory.mktemp("cluster")
    with Cluster(folder, keep=False) as running:
        running.create_database("site")
        yield running


def add_databases(cluster: Cluster, **options: Any) -> None:
    for alias, node in ALIASES.items():
        entry = {**cluster.database(node, "site"), "CONN_MAX_AGE": None, **options}
        connections.settings[alias] = connections.configure_settings({"default": {}, alias: entry})[
            alias
        ]


@pytest.fixture(scope="session")
def tables(cluster: Cluster, django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    add_databases(cluster)
    with (
        django_db_blocker.unblock(),
        override_settings(DATABASE_ROUTERS=["tests.real.conftest.OnPostgreSQL"]),
    ):
        # The tables of the migrated apps first: those of the tests refer to them.
        call_command("migrate", database="pg", verbosity=0)
        call_command("migrate", database="pg", run_syncdb=True, verbosity=0)
    yield
    for alias in ALIASES:
        connections[alias].close()
        del connections.settings[alias]


@pytest.fixture
def postgresql(cluster: Cluster, tables: None, django_db_blocker: Any) -> Iterator[Cluster]:
    """The cluster, with all models on it, all of its nodes up and caught up."""
    with (
        django_db_blocker.unblock(),
        override_settings(
            DATABASE_ROUTERS=[
                "pinning_middleware.routers.PinningRouter",
                "tests.real.conftest.OnPostgreSQL",
            ],
            PINNING_REPLICAS={"pg": ["pg1", "pg2"]},
            PINNING_RETRY_AFTER=0,
        ),
    ):
        cluster.wait_caught_up()
        yield cluster
        for alias in ALIASES:
            connections[alias].close()
        for node in cluster.replicas:
            node.start()
            node.resume()
        call_command("flush", database="pg", interactive=False, verbosity=0)
