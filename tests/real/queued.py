"""
Tasks of Django (or django-tasks), kept in PostgreSQL by django-tasks-db: the app's `ready()`, and
`python -m tests.real.queued`, which writes, enqueues a task and prints its ID.
"""

from __future__ import annotations

import os

from django.apps import AppConfig


class Queued(AppConfig):
    name = "tests.real"
    label = "queued"

    def ready(self) -> None:
        from pinning_middleware.tasks import propagate_pins

        if os.environ["WORKER_CARRIES"] == "1":
            propagate_pins()


def main() -> None:
    import django

    django.setup()
    from django.apps import apps
    from django.db import connections, transaction

    from pinning_middleware import pinning_scope
    from tests.app.models import Book
    from tests.real.queued_tasks import see

    queue = apps.get_model("django_tasks_database", "DBTaskResult")
    connection = connections["pg"]
    if queue._meta.db_table not in connection.introspection.table_names():
        with connection.schema_editor() as editor:
            editor.create_model(queue)
    with pinning_scope(), transaction.atomic(using="pg"):
        Book.objects.create(title="new")
        # Inside the transaction: the pin is completed when it commits.
        result = see.enqueue("new")
    print(result.id)


if __name__ == "__main__":
    main()
