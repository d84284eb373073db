"""
A process whose Django uses psycopg2, as psycopg 3 cannot be imported there: for each line of its
input, a read that sleeps for so many seconds. Prints the port of the server that answered.
"""

from __future__ import annotations

import json
import os
import sys

import django
from django.conf import settings
from django.db import connections
from django.db.backends.postgresql.psycopg_any import is_psycopg3

from pinning_middleware import pinning_scope

SQL = "SELECT 1 AS id, inet_server_port() AS port, pg_sleep(%s)"


def main() -> None:
    assert not is_psycopg3
    entries = json.loads(os.environ["DATABASES_OF_TEST"])
    settings.configure(
        INSTALLED_APPS=["django.contrib.contenttypes", "pinning_middleware", "tests.app"],
        DATABASES={"default": entries["pg"], "pg1": entries["pg1"]},
        DATABASE_ROUTERS=["pinning_middleware.routers.PinningRouter"],
        PINNING_REPLICAS=["pg1"],
    )
    django.setup()
    from tests.app.models import Book

    for line in sys.stdin:
        with pinning_scope():
            (book,) = Book.objects.raw(SQL, [float(line)])
        print(book.port, flush=True)
    connections.close_all()
