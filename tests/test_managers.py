from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import models, transaction
from django.test import override_settings

from pinning_middleware import (
    is_pinned,
    managers,
    pin_this_request,
    pinning_scope,
    use_primary,
    use_replica,
)
from pinning_middleware.scopes.scope import enter
from pinning_middleware.testing import replicas
from tests.app.models import Slurpee
from tests.conftest import Visit, saved

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@pytest.fixture
def alone() -> Iterator[None]:
    """The legacy interface, without the router, the middleware or a pool."""
    with override_settings(
        SLAVE_DATABASES=["slave"], PINNING_REPLICAS=[], DATABASE_ROUTERS=[], MIDDLEWARE=[]
    ):
        yield


@pytest.fixture
def filled() -> None:
    """One row with the number 1 on `default`, and with the number 2 on `slave`."""
    Slurpee(pk=1, number=2).save()
    replicas.catch_up("slave")
    models.QuerySet(Slurpee).using("default").update(number=1)
    # The write of this fixture must not pin the test.
    enter(None)


READS: dict[str, Callable[[], Any]] = {
    "get": lambda: Slurpee.objects.get().number,
    "list": lambda: next(iter(list(Slurpee.objects.all()))).number,
    "filter": lambda: Slurpee.objects.filter(pk=1).order_by("pk").first().number,
    "exists": lambda: 2 if Slurpee.objects.filter(number=2).exists() else 1,
    "count": lambda: 2 if Slurpee.objects.filter(number=2).count() else 1,
    "values": lambda: Slurpee.objects.values_list("number", flat=True)[0],
    "iterator": lambda: next(Slurpee.objects.iterator()).number,
    "in_bulk": lambda: Slurpee.objects.in_bulk()[1].number,
    "aggregate": lambda: Slurpee.objects.aggregate(models.Max("number"))["number__max"],
    "union": lambda: Slurpee.objects.union(Slurpee.objects.all())[0].number,
    "get_or_create": lambda: Slurpee.objects.get_or_create(pk=1)[0].number + 1,
    "aget": lambda: async_to_sync(Slurpee.objects.all().aget)().number,
}
WRITES: dict[str, Callable[[], Any]] = {
    "save": lambda: Slurpee(number=3).save(),
    "create": lambda: Slurpee.objects.create(number=3),
    "bulk_create": lambda: Slurpee.objects.bulk_create([Slurpee(number=3)]),
    "bulk_update": lambda: Slurpee.objects.bulk_update([Slurpee(pk=1, number=3)], ["number"]),
    "get_or_create": lambda: Slurpee.objects.get_or_create(number=3),
    "update_or_create": lambda: Slurpee.objects.update_or_create(number=3),
    "update": lambda: Slurpee.objects.update(number=3),
    "filtered update": lambda: Slurpee.objects.filter(number=1).update(number=3),
    "save of what was read": lambda: changed().save(),
    "save of some fields": lambda: changed().save(update_fields=["number"]),
    "acreate": lambda: async_to_sync(Slurpee.objects.all().acreate)(number=3),
    "asave": lambda: async_to_sync(changed().asave)(),
}
DELETES: dict[str, Callable[[], Any]] = {
    "delete": lambda: Slurpee.objects.all().delete(),
    "filtered delete": lambda: Slurpee.objects.filter(number=1).delete(),
    "delete of what was read": lambda: changed().delete(),
    "adelete": lambda: async_to_sync(changed().adelete)(),
}


def changed() -> Slurpee:
    slurpee = Slurpee.objects.get()
    slurpee.number = 3
    return slurpee


def numbers(alias: str) -> set[int]:
    return set(Slurpee.objects.using(alias).values_list("number", flat=True))


def test_legacy_names_are_importable() -> None:
    assert managers.SlaveManager is managers.ReplicaManager
    assert managers.SlaveQuerySet is managers.ReplicaQuerySet
    assert managers.SlaveMixin is managers.ReplicaMixin


@pytest.mark.usefixtures("alone", "filled")
class TestAlone:
    pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

    @pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
    def test_reads_use_the_replica(self, read: Callable[[], Any]) -> None:
        with pinning_scope():
            assert read() == 2

    def test_evaluated_queryset_follows_the_current_override(self) -> None:
        slurpees = Slurpee.objects.all()
        assert slurpees.db == "slave"
        with use_primary():
            assert slurpees.db == "default"
        with transaction.atomic():
            assert slurpees.db == "default"
        assert slurpees.db == "slave"

    @pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
    def test_writes_use_default(self, write: Callable[[], Any]) -> None:
        with pinning_scope():
            write()
        assert 3 in numbers("default")
        assert numbers("slave") == {2}

    @pytest.mark.parametrize("delete", DELETES.values(), ids=DELETES.keys())
    def test_deletes_use_default(self, delete: Callable[[], Any]) -> None:
        with pinning_scope():
            delete()
        assert numbers("default") == set()
        assert numbers("slave") == {2}

    def test_using_takes_precedence(self) -> None:
        with pinning_scope():
            assert Slurpee.objects.using("default").get().number == 1
            assert Slurpee.objects.db_manager("default").get().number == 1
            Slurpee.objects.using("slave").update(number=4)
            Slurpee(pk=5, number=5).save(using="slave")
            assert numbers("slave") == {4, 5}
            Slurpee(pk=5).delete(using="slave")
            assert Slurpee.objects.using("slave").create(number=6)._state.db == "slave"
        assert numbers("slave") == {4, 6}
        assert numbers("default") == {1}

    def test_saved_instance_is_read_from_its_database(self) -> None:
        with pinning_scope():
            slurpee = changed()
            slurpee.save()
            assert saved(slurpee) == "default"
            slurpee.refresh_from_db()
            assert slurpee.number == 3

    def test_manager_db(self) -> None:
        with pinning_scope():
            assert Slurpee.objects.db == Slurpee.objects.all().db == "slave"


@pytest.mark.usefixtures("alone")
class TestTurns:
    pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

    @pytest.mark.parametrize("in_scope", [False, True])
    @override_settings(SLAVE_DATABASES=["slave", "elsewhere", "users"])
    def test_querysets_are_round_robin(self, in_scope: bool) -> None:
        """By queryset without the middleware, by scope with it."""
        turns: list[str] = []
        for _ in range(6):
            if in_scope:
                with pinning_scope():
                    turns.append(Slurpee.objects.all().db)
            else:
                turns.append(Slurpee.objects.all().db)
        assert Counter(turns) == {"slave": 2, "elsewhere": 2, "users": 2}
        assert turns[:3] == turns[3:]

    def test_first_replica_is_randomised(self) -> None:
        first = set()
        for _ in range(64):
            with override_settings(SLAVE_DATABASES=["slave", "elsewhere"]), pinning_scope():
                first.add(Slurpee.objects.db)
        assert first == {"slave", "elsewhere"}

    @pytest.mark.parametrize("settings", [{"SLAVE_DATABASES": None}, {"SLAVE_DATABASES": []}])
    def test_reads_without_replicas_use_default(self, settings: dict[str, Any]) -> None:
        with override_settings(**settings), pinning_scope():
            assert Slurpee.objects.db == "default"
            assert saved(Slurpee.objects.create(number=1)) == "default"

    @override_settings(SLAVE_DATABASES=["slave"], PINNING_ENABLED=False)
    def test_disabled_setting_uses_default(self) -> None:
        assert Slurpee.objects.db == "default"


@override_settings(SLAVE_DATABASES=["slave"])
def test_pins_with_the_middleware_apply(visit: Visit) -> None:
    """Pins of a write, a method, a manual pin, and an earlier request."""

    def place(request: Any = None) -> str:
        return Slurpee.objects.db

    assert visit(place) == "slave"
    assert visit(place, "post") == "default"
    assert visit(lambda request: (pin_this_request(seconds=0), place())[1]) == "default"
    assert visit(lambda request: (use_primary(place)(), place())) == ("default", "slave")
    assert visit(lambda request: (Slurpee.objects.create(number=1), place())[1]) == "default"
    assert visit(place) == "default"
    assert visit(use_replica(place)) == "slave"


@override_settings(SLAVE_DATABASES=["slave"], PINNING_REPLICAS=[])
def test_pins_with_the_middleware_and_no_pool_apply(visit: Visit) -> None:
    visit(lambda request: Slurpee.objects.create(number=1))
    assert visit(lambda request: (Slurpee.objects.db, is_pinned())) == ("default", True)


def test_pool_of_default_is_used_without_the_legacy_setting(visit: Visit) -> None:
    assert visit(lambda request: Slurpee.objects.db) in ("replica1", "replica2")


def test_both_interfaces_use_one_replica_of_one_pool(visit: Visit) -> None:
    from tests.conftest import where

    older, newer = visit(lambda request: (Slurpee.objects.db, where()))
    assert older == newer
