"""
Tasks of Django (or django-tasks), kept in the primary by django-tasks-db: the app's `ready()`, and
`python -m tests.real.queued write TITLE`, which writes, enqueues a task and prints its ID
(`atomic TITLE` does so in a transaction);
`python -m tests.real.queued result ID` prints what it returned.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext

from django.apps import AppConfig


class Queued(AppConfig):
    name = "tests.real"
    label = "queued"

    def ready(self) -> None:
        from pinning_middleware.tasks import propagate_pins

        if os.environ["WORKER_CARRIES"] == "1":
            propagate_pins()


def main(command: str, argument: str) -> None:
    import django

    django.setup()
    from django.apps import apps
    from django.conf import settings
    from django.db import connections, transaction

    from pinning_middleware import pinning_scope
    from tests.app.models import Book
    from tests.real.queued_tasks import see

    if command == "result":
        print(json.dumps(see.get_result(argument).return_value))
        return
    queue = apps.get_model("django_tasks_database", "DBTaskResult")
    connection = connections[settings.PRIMARY]
    if queue._meta.db_table not in connection.introspection.table_names():
        with connection.schema_editor() as editor:
            editor.create_model(queue)
    in_transaction = transaction.atomic(using=settings.PRIMARY)
    with pinning_scope(), in_transaction if command == "atomic" else nullcontext():
        Book.objects.create(title=argument)
        # Inside the transaction the position of its commit is unknown: the pin has none.
        result = see.enqueue(argument)
    print(result.id)


if __name__ == "__main__":
    main(*sys.argv[1:])
