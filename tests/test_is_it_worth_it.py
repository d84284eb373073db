"""The walk-through of ``docs/how-to/is-it-worth-it.md``, on a site of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from .contrib.pages import DOCS

ROOT = DOCS.parent
PAGE = (DOCS / "how-to" / "is-it-worth-it.md").read_text()
(SETTINGS,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
CONSOLE = re.compile(r"^```console\n\$ python (.*?)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = CONSOLE.findall(PAGE)

# The settings of a site, which those of the page complete.
BASE = """
from pathlib import Path
from tests.settings import *
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "site.sqlite3"}}
backend = "django.core.cache.backends.filebased.FileBasedCache"
CACHES = {"default": {"BACKEND": backend, "LOCATION": str(Path("cache").resolve())}}
ROOT_URLCONF = "urls"
own = {name: globals()[name] for name in ("INSTALLED_APPS", "MIDDLEWARE", "DATABASE_ROUTERS")}
"""
FILLED = """
for name, entries in own.items():
    given = globals()[name]
    others = [entry for entry in entries if entry not in given]
    globals()[name] = [*given[: given.index(...)], *others, *given[given.index(...) + 1 :]]
"""
URLS = """
from django.db import transaction
from django.http import HttpResponse
from django.urls import path
from tests.app.models import Tag

def read(request):
    return HttpResponse(Tag.objects.count())

def write(request):
    Tag.objects.create(name="x")
    return HttpResponse()

def transfer(request):
    with transaction.atomic():
        return HttpResponse(Tag.objects.count())

urlpatterns = [path("read", read), path("write", write), path("transfer", transfer)]
"""
# The usual traffic. At its exit the process writes its counts to the cache.
TRAFFIC = """
import os
os.environ["DJANGO_SETTINGS_MODULE"] = "site_settings"
import django
django.setup()
from django.core.management import call_command
from django.test import Client
from pinning_middleware.utils import counters
call_command("migrate", run_syncdb=True, verbosity=0)
counters.reads.clear()
for _ in range(160):
    Client(headers={"host": "localhost"}).get("/read")
for _ in range(20):
    Client().post("/read")
for _ in range(10):
    Client().get("/transfer")
for _ in range(10):
    client = Client()
    client.post("/write")
    client.get("/read")
"""


class Site:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "site_settings.py").write_text(BASE + SETTINGS + FILLED)
        (folder / "urls.py").write_text(URLS)
        (folder / "traffic.py").write_text(TRAFFIC)
        (folder / "manage.py").write_text(
            textwrap.dedent(
                """
                import os, sys
                os.environ["DJANGO_SETTINGS_MODULE"] = "site_settings"
                from django.core.management import execute_from_command_line
                execute_from_command_line(sys.argv)
                """
            )
        )

    def run(self, command: str) -> str:
        """Run ``python …`` in the site's folder and return what it prints."""
        return subprocess.run(
            [sys.executable, *command.split()],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        ).stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    made = Site(tmp_path_factory.mktemp("site"))
    made.run("traffic.py")
    return made


@pytest.mark.parametrize(("command", "output"), COMMANDS, ids=lambda value: value[:30])
def test_command_prints_what_the_page_shows(site: Site, command: str, output: str) -> None:
    found = site.run(command)
    if "--json" in command:
        run = json.loads(found)["dry_run"]["default"]
        assert (run["reads"], run["to_replicas"], run["missed_writes"]) == (200, 160, 10)
    else:
        assert found.strip() == output.strip()


def test_page_shows_every_command() -> None:
    assert [command for command, _ in COMMANDS] == [
        "manage.py check",
        "manage.py pinning_status",
        "manage.py pinning_status --json",
    ]
