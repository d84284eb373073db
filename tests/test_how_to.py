"""Every Python block of the how-to pages runs, and its settings pass the system checks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from django.core.checks import run_checks
from django.http import HttpResponse
from django.test import override_settings
from rest_framework import serializers

from tests.app.models import Book
from tests.app.routers import UsersRouter

from .contrib.pages import DOCS, Block, blocks, name_of

pytestmark = [
    pytest.mark.django_db(transaction=True, databases="__all__"),
    pytest.mark.filterwarnings("ignore:Overriding setting"),
]

# The tests of these pages run their blocks: as the tests of a site, with a package, or as settings.
ELSEWHERE = {
    "testing.md",
    "integrations.md",
    "coming-from.md",
    "switch-off.md",
    "tenants.md",
}
PAGES = [
    page
    for page in sorted((DOCS / "how-to").glob("*.md"))
    if page.name not in ELSEWHERE and "```python" in page.read_text()
]
# Apps in the settings of the pages that the tests do not install.
OTHER_APPS = {"constance", "django_tasks_database", "shop", "sites", "waffle"}
BLOCKS = [(page, block) for page in PAGES for block in blocks(page)]


def name_of_block(value: Any) -> str:
    return value.heading[:40] if isinstance(value, Block) else name_of(value)


class BookSerializer(serializers.ModelSerializer[Book]):
    class Meta:
        model = Book
        fields = ("title",)


GIVEN: dict[str, dict[str, Any]] = {
    "shop": {},
    "shop.models": {"Book": Book, "Price": Book},
    "shop.routers": {"UsersRouter": UsersRouter},
    "shop.serializers": {"BookSerializer": BookSerializer},
    "shop.types": {},
}


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of a site from which the blocks import."""
    import strawberry

    @strawberry.type
    class Query:
        title: str = ""

    @strawberry.type
    class Mutation:
        @strawberry.mutation
        def add(self) -> str:
            return ""

    import graphene

    class Titles(graphene.ObjectType):
        title = graphene.String()

    GIVEN["shop.schema"] = {"schema": graphene.Schema(query=Titles)}
    GIVEN["shop.types"] = {"Query": Query, "Mutation": Mutation}
    for name, values in GIVEN.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=name_of_block)
def test_block_runs_and_its_settings_are_valid(
    page: Path, block: Block, shop: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("tests.app.how_to")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    namespace = module.__dict__ | {"HttpResponse": HttpResponse, "Order": Book}
    exec(block.code, namespace)
    chosen = {name: value for name, value in namespace.items() if name.startswith("PINNING_")}
    chosen |= {name: namespace[name] for name in ("SESSION_ENGINE",) if name in namespace}
    known = {"default", "replica1", "replica2"}
    if "PINNING_REPLICAS" in chosen and not set(names_of(chosen["PINNING_REPLICAS"])) <= known:
        del chosen["PINNING_REPLICAS"]
    labels = chosen.get("PINNING_PRIMARY_MODELS", [])
    if OTHER_APPS & {label.partition(".")[0] for label in labels}:
        del chosen["PINNING_PRIMARY_MODELS"]
    for name in ("PINNING_OFFLOAD", "PINNING_USER_KEY", "PINNING_SESSION_SETUP"):
        if str(chosen.get(name, "")).startswith("shop."):
            del chosen[name]
    with override_settings(**chosen):
        found = [each for each in run_checks(tags=["pinning"]) if each.level >= 40]
    assert found == []


def names_of(replicas: Any) -> list[str]:
    return [*replicas] if isinstance(replicas, list) else [n for r in replicas.values() for n in r]
