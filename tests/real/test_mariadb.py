"""Domains, and what else only MariaDB has."""

from __future__ import annotations

import pytest
from django.db import connections, transaction
from django.test import override_settings

from pinning_middleware import tokens
from pinning_middleware.pins import Pin, PinKey, Position
from tests.app.models import Book

from . import mariadb
from .conftest import (
    eventually,
    in_thread,
    pin_in,
    position_in,
    server,
    server_for,
    titles,
    unrelated_scope,
    write,
)
from .mariadb import Servers
from .test_gtid import REPLICAS, create

pytestmark = pytest.mark.real


@pytest.fixture
def product() -> type[Servers]:
    return mariadb.Servers


def test_replica_is_not_probed_inside_a_transaction(my: Servers) -> None:
    """A wait inside it returns "reached", and its snapshot does not change."""
    with (
        override_settings(PINNING_WAIT=0.05),
        transaction.atomic(using="my1"),
        transaction.atomic(using="my2"),
    ):
        for alias in REPLICAS:
            with connections[alias].cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute("SELECT count(*) FROM app_book")
        token = write()
        my.wait_for()
        assert titles(token) == ["new"]
        assert server_for(token) == "my"


def set_domain(number: int) -> None:
    with connections["my"].cursor() as cursor:
        cursor.execute(f"SET SESSION gtid_domain_id = {number}")


def test_every_shared_domain_is_required(own: Servers) -> None:
    """Reads after writes in two domains are causal in both."""
    own.pause()
    with unrelated_scope() as scope:
        create()
        set_domain(5)
        create()
        set_domain(0)
    position = position_in(scope.token)
    assert {log.lstrip("?") for log in position} >= {"0-1", "5-1"}
    assert server_for(scope.token) == "my"
    own.resume("my2")
    assert server_for(scope.token) == "my2"
    # A later write in one domain still requires the position in the other.
    own.pause()
    with unrelated_scope() as five:
        set_domain(5)
        create()
        set_domain(0)
    with unrelated_scope(five.token) as both:
        create()
    assert server_for(both.token) == "my"
    own.resume("my1")
    assert server_for(both.token) == "my1"


def test_domain_without_a_replica_is_not_required(own: Servers) -> None:
    """Other clients write in it; a pin in another domain is still reached."""
    for alias in REPLICAS:
        own[alias].follow(own["my"], IGNORE_DOMAIN_IDS="(9)")
    try:
        own["my"].execute("SET SESSION gtid_domain_id = 9; CREATE DATABASE IF NOT EXISTS local")
        token = write()
        assert any(log.startswith("9-") for log in pin_in(token).position.optional)
        assert eventually(lambda: server_for(token) in REPLICAS)
    finally:
        for alias in REPLICAS:
            own[alias].follow(own["my"], IGNORE_DOMAIN_IDS="()")


@pytest.mark.parametrize("kind", ["no-op", "rollback", "read"])
def test_last_gtid_of_a_persistent_connection(my: Servers, kind: str) -> None:
    """
    It is that of an earlier request if this one wrote nothing. Data this scope has read from the
    primary, including writes of others, is included in its position.
    """
    write("mine")
    in_thread(lambda: write("theirs"))
    my.wait_for()
    my.pause()
    with unrelated_scope() as scope:
        if kind == "no-op":
            Book.objects.filter(title="mine").update(title="mine")
        elif kind == "rollback":
            with transaction.atomic(using="my"):
                create()
                transaction.set_rollback(True, using="my")
        else:
            assert server() in REPLICAS
    if kind == "read":
        assert scope.token is None
        return
    assert position_in(scope.token) == my["my"].written
    # The domain is not required if no replica has it.
    assert server_for(scope.token) in REPLICAS


def test_position_of_another_server_is_never_reached(my: Servers) -> None:
    token = write()
    my.wait_for()
    for log in ("0-7", "7-1", "0-12"):
        other = tokens.dumps({PinKey("my"): Pin(pin_in(token).until, 0.0, Position({log: 1}))})
        assert server_for(other) == "my"
    assert server_for(token) in REPLICAS
