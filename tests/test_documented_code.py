"""The Python of the reference and the explanation runs, on databases."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.checks import run_checks
from django.http import HttpResponse
from django.shortcuts import get_object_or_404
from django.test import override_settings

from tests.app.models import Book

from .contrib.pages import PAGES, Block, blocks, name_of

BLOCKS = [
    (name_of(page), block)
    for page in PAGES
    if not name_of(page).startswith(("how-to/", "tutorial"))
    for block in blocks(page)
    # Those of how-to guides need other packages, and those of the tutorial their order: they have
    # tests of their own.
]


def run(block: Block) -> dict[str, Any]:
    """Run a block with the names that its page uses without importing them."""
    namespace: dict[str, Any] = {
        "__name__": "tests.app.documented",
        "HttpResponse": HttpResponse,
        "Order": Book,
        "get_object_or_404": get_object_or_404,
    }
    exec(block.code, namespace)
    return namespace


@pytest.mark.django_db(transaction=True, databases="__all__")
@pytest.mark.parametrize(
    ("page", "block"), BLOCKS, ids=[f"{page}-{number}" for number, (page, _) in enumerate(BLOCKS)]
)
def test_block_runs_and_its_settings_are_valid(page: str, block: Block) -> None:
    namespace = run(block)
    chosen = {name: value for name, value in namespace.items() if name.startswith("PINNING_")}
    with override_settings(**chosen):
        found = {message.id for message in run_checks(tags=["pinning"])}
    # The aliases and the cache are those of these tests.
    assert found <= {"pinning_middleware.E002", "pinning_middleware.W008"}
