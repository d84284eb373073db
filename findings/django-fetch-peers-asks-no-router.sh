#!/usr/bin/env bash
# Django 6.1.3: with FETCH_ONE a deferred field is read from the database that the router's db_for_read() returns; with FETCH_PEERS from
# the `_state.db` of the first instance, without asking the router. A deferred foreign key's object asks the router in both modes.
# Expected: the fetch mode changes the number of queries, and not the database that they are sent to.
# Seen: "FETCH_ONE read 'second'", "FETCH_PEERS read 'first'".
set -euo pipefail
python=${PYTHON:-python3}  # 3.12 or later
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'django==6.1.3'
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import django
from django.conf import settings

DATABASES = {name: {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{name}.sqlite3"} for name in ("first", "second")}


class Router:
    read = "first"

    def db_for_read(self, model, **hints):
        return Router.read


settings.configure(DATABASES={**DATABASES, "default": {}}, DATABASE_ROUTERS=[Router()])
django.setup()

from django.db import connections, models


class Book(models.Model):
    title = models.CharField(max_length=20)

    class Meta:
        app_label = "shop"


for alias in DATABASES:
    with connections[alias].schema_editor() as editor:
        editor.create_model(Book)
    Book.objects.using(alias).bulk_create([Book(pk=pk, title=alias) for pk in (1, 2)])

found = {}
for mode in (models.FETCH_ONE, models.FETCH_PEERS):
    Router.read = "first"
    books = list(Book.objects.only("pk").fetch_mode(mode))
    Router.read = "second"
    name = mode.__reduce__()
    found[name] = books[0].title
    print(f"{name} read {books[0].title!r}")
sys.exit(found != {"FETCH_ONE": "second", "FETCH_PEERS": "first"})
PYTHON
