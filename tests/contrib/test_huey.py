"""huey in one process; ``tests/real`` has a consumer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.core.cache import caches
from django.db import transaction
from freezegun.api import FrozenDateTimeFactory
from huey import MemoryHuey

from pinning_middleware import handoff, pinning_scope
from pinning_middleware.contrib.huey import PinnedHuey
from tests.app.models import Book

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


class Huey(PinnedHuey, MemoryHuey):  # type: ignore[misc]
    pass


@pytest.fixture
def huey() -> Iterator[Huey]:
    yield Huey("tests", immediate=False)
    caches["default"].clear()


def test_retry_with_a_delay_inherits_the_pins_of_the_first_attempt(huey: Huey) -> None:
    """The scheduler enqueues it later, outside of any scope."""

    @huey.task(retries=1, retry_delay=60)  # type: ignore[untyped-decorator]
    def write_and_fail() -> None:
        Book.objects.create(title="new")
        raise ValueError

    write_and_fail()
    task = huey.dequeue()
    assert handoff.load_pins(task.id) == {}
    huey.execute(task)
    assert huey.scheduled_count() == 1
    assert handoff.load_pins(task.id)


@pytest.mark.parametrize("first", ["write", "task"])
def test_task_of_a_long_transaction_keeps_the_pin_until_after_its_commit(
    huey: Huey, clock: FrozenDateTimeFactory, first: str
) -> None:
    @huey.task()  # type: ignore[untyped-decorator]
    def read() -> None:
        pass

    with pinning_scope(isolated=True), transaction.atomic():
        if first == "task":
            task = read().task
        Book.objects.create(title="new")
        if first == "write":
            task = read().task
        clock.tick(20)
    assert handoff.load_pins(task.id)
    clock.tick(10)
    assert handoff.load_pins(task.id)
