"""
A process whose Django uses psycopg2, as psycopg 3 cannot be imported there. For each line of its
input: a read that sleeps for so many seconds, prints the port of the server that answered; "write",
two transactions that pin a key as soon as they end, prints how many rows they have committed.
"""

from __future__ import annotations

import json
import os
import sys

import django
from django.conf import settings
from django.db import connections, transaction
from django.db.backends.postgresql.psycopg_any import is_psycopg3

from pinning_middleware import pin_keys, pinning_scope

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

    def write() -> int:
        for _ in range(2):
            with transaction.atomic(), pinning_scope():
                pin_keys("books")
                Book.objects.create(title="psycopg2")
        connections.close_all()
        return Book.objects.using("default").filter(title="psycopg2").count()

    def read(seconds: float) -> int:
        with pinning_scope():
            (book,) = Book.objects.raw(SQL, [seconds])
        return int(book.port)

    for line in sys.stdin:
        print(write() if line.strip() == "write" else read(float(line)), flush=True)
    connections.close_all()
