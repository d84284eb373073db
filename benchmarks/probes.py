"""Time of a probe, compared with ``SELECT 1`` on the same connection, by database role."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from .fleet import ROLES, site
from .measure import compare

ROUNDS = int(os.environ.get("ROUNDS", "60"))
TIMES = 50


def main() -> None:
    with site():
        from pinning_middleware.servers.dialects.postgresql import LSN, REPORTS
        from pinning_middleware.servers.probe import probe

        statement = f"SELECT {REPORTS[LSN]}"

        def ask(connection: BaseDatabaseWrapper, sql: str) -> None:
            with connection.cursor() as cursor:
                cursor.execute(sql)
                cursor.fetchone()

        def fetch(raw: Any, sql: str) -> None:
            raw.execute(sql).fetchone()

        for alias in ("default", "replica1"):
            for role, name in ROLES.items():
                connection = connections[alias]
                connection.close()
                connection.settings_dict = {**connection.settings_dict, "USER": name}
                # The first probe also identifies the server.
                probe(connection)
                raw = connection.connection
                where = f"{'primary' if alias == 'default' else 'replica':7}  {role:9}"
                for what, ours, theirs in (
                    (
                        "probe / SELECT 1 through Django:",
                        partial(probe, connection),
                        partial(ask, connection, "SELECT 1"),
                    ),
                    (
                        "its statement / SELECT 1 by psycopg:",
                        partial(fetch, raw, statement),
                        partial(fetch, raw, "SELECT 1"),
                    ),
                ):
                    print(where, what, compare(ours, theirs, TIMES, ROUNDS), flush=True)


if __name__ == "__main__":
    main()
