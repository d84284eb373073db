"""Which replica a read goes to: that of its user, those of the lowest tier, or those of a group."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.http import HttpRequest
from django.test import override_settings

from pinning_middleware import pinning_scope, routers, use_primary, use_replica
from pinning_middleware.pool_specs import Placement, parse_pools
from pinning_middleware.testing import capture_reads, replicas
from tests.app.models import Book
from tests.conftest import ROUTER, Browser, Visit, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

BY_USER = override_settings(
    PINNING_BALANCE_BY="user",
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
    SESSION_SERIALIZER="django.contrib.sessions.serializers.JSONSerializer",
)
TIERS = override_settings(PINNING_REPLICAS={"default": {"replica1": 3, "replica2": {"tier": 2}}})
REPORTS = {"default": {"replica1": 1, "replica2": {"groups": ["reports"]}}}
GROUPS = override_settings(PINNING_REPLICAS=REPORTS)


@pytest.fixture(autouse=True)
def all_replicas_are_up() -> Iterator[None]:
    yield
    replicas.reset()


def header_key(request: HttpRequest) -> str | None:
    return request.headers.get("X-User")


def broken_key(request: HttpRequest) -> str | None:
    raise RuntimeError("by the test")


def user_key(request: Any) -> str | None:
    return str(request.user.pk) if request.user.is_authenticated else None


def seen_by(visit: Visit, times: int = 6, **kwargs: Any) -> set[str]:
    return {visit(**kwargs) for _ in range(times)}


# PINNING_BALANCE_BY = "user"


@override_settings(PINNING_BALANCE_BY="user", PINNING_USER_KEY=f"{__name__}.header_key")
def test_user_stays_on_one_replica_and_returns_to_it(visit: Visit) -> None:
    by_user = {user: seen_by(visit, headers={"X-User": user}) for user in map(str, range(12))}
    assert all(len(seen) == 1 for seen in by_user.values())
    assert set.union(*by_user.values()) == {"replica1", "replica2"}
    with replicas.take_down("replica1"):
        for user in by_user:
            assert seen_by(visit, 2, headers={"X-User": user}) == {"replica2"}
    for user, before in by_user.items():
        assert seen_by(visit, 2, headers={"X-User": user}) == before


@BY_USER
def test_logged_in_user_has_one_replica_on_every_device(
    new_browser: Callable[..., Browser], do: Callable[..., str]
) -> None:
    def act(request: Any) -> str:
        request.user.is_authenticated  # noqa: B018
        return where()

    path, by_user = f"/sync/{do(act)}/", {}
    for number in range(8):
        user = User.objects.create(username=str(number))
        for _ in range(2):
            browser = new_browser()
            browser.client.force_login(user)
            seen = {browser.get(path).content.decode() for _ in range(3)}
            by_user.setdefault(number, set()).update(seen)
    assert all(len(seen) == 1 for seen in by_user.values())
    assert set.union(*by_user.values()) == {"replica1", "replica2"}


@pytest.mark.parametrize("key", ["pinning_middleware.stores.user_key", f"{__name__}.user_key"])
def test_balancing_by_user_loads_neither_session_nor_user(visit: Visit, key: str) -> None:
    """The raw value of the cookie is the key meanwhile."""
    with override_settings(PINNING_BALANCE_BY="user", PINNING_USER_KEY=key):
        user = User.objects.create(username="one")
        visit.browser.client.force_login(user)
        replicas.catch_up()
        visit.browser.cookies.pop("pinning", None)
        with capture_reads() as reads:
            assert len(seen_by(visit)) == 1
        assert reads == []

        def load_session(request: Any) -> str:
            assert request.session.get("_auth_user_id") == str(user.pk)
            return where()

        with capture_reads() as reads:
            visit(load_session)
        assert [read.model for read in reads] == [Session]


@override_settings(PINNING_BALANCE_BY="user")
def test_anonymous_user_stays_on_the_replica_of_the_session_cookie(visit: Visit) -> None:
    by_cookie = {}
    for number in range(12):
        visit.browser.cookies["sessionid"] = f"{number:032}"
        by_cookie[number] = seen_by(visit)
    assert all(len(seen) == 1 for seen in by_cookie.values())
    assert set.union(*by_cookie.values()) == {"replica1", "replica2"}


@pytest.mark.parametrize("key", ["header_key", "broken_key"])
def test_request_of_an_unknown_user_is_balanced_round_robin(visit: Visit, key: str) -> None:
    with override_settings(PINNING_BALANCE_BY="user", PINNING_USER_KEY=f"{__name__}.{key}"):
        assert seen_by(visit, 2) == {"replica1", "replica2"}


def test_scope_inside_a_request_reads_the_replica_of_its_user(visit: Visit) -> None:
    def act(request: Any) -> set[str]:
        with pinning_scope():
            return {where()}

    with override_settings(PINNING_BALANCE_BY="user", PINNING_USER_KEY=f"{__name__}.header_key"):
        seen = [visit(act, headers={"X-User": "one"}) for _ in range(4)]
    assert set.union(*seen) == seen[0]


# Tiers


@TIERS
def test_higher_tier_serves_while_the_lower_ones_are_out(visit: Visit) -> None:
    assert seen_by(visit) == {"replica1"}
    with replicas.take_down("replica1"):
        assert seen_by(visit) == {"replica2"}
        with replicas.take_down("replica2"):
            assert seen_by(visit) == {"default"}
    assert seen_by(visit) == {"replica1"}


@TIERS
def test_scope_leaves_a_higher_tier_when_a_lower_one_is_back() -> None:
    with pinning_scope():
        with replicas.take_down("replica1"):
            assert where() == "replica2"
        assert where() == "replica1"


# Groups


def of_group(request: Any = None) -> str:
    with use_replica(group="reports"):
        return where()


@GROUPS
def test_replica_with_groups_serves_only_their_reads(visit: Visit) -> None:
    assert seen_by(visit) == {"replica1"}
    assert {visit(of_group) for _ in range(4)} == {"replica2"}


@GROUPS
def test_group_is_a_decorator_and_the_innermost_block_wins() -> None:
    @use_replica(group="reports")
    def report() -> tuple[str, str, str]:
        with use_primary():
            inside = where()
        with use_replica():
            plain = where()
        return where(), inside, plain

    assert report() == ("replica2", "default", "replica1")


@GROUPS
def test_group_that_is_out_falls_back_like_use_replica(visit: Visit) -> None:
    with replicas.take_down("replica2"):
        assert visit(of_group) == "replica1"
        with replicas.take_down("replica1"):
            assert visit(of_group) == "default"
    assert visit(of_group) == "replica2"


def test_group_is_balanced_by_weight_and_its_scope_keeps_one_replica() -> None:
    members = {
        "replica1": {"weight": 3, "groups": ["reports"]},
        "replica2": {"groups": ["reports"]},
    }
    with override_settings(PINNING_REPLICAS={"default": members}):
        turns = []
        for _ in range(8):
            with pinning_scope():
                turns.append(of_group())
                assert of_group() == turns[-1]
    assert sorted(turns) == ["replica1"] * 6 + ["replica2"] * 2


def test_drained_replica_of_a_group_is_not_used() -> None:
    members = {"replica1": 1, "replica2": {"weight": 0, "groups": ["reports"]}}
    with override_settings(PINNING_REPLICAS={"default": members}):
        assert of_group() == "replica1"


def test_block_of_a_group_does_not_change_the_replica_of_the_scope() -> None:
    members = {"replica1": 1, "slave": 1, "replica2": {"groups": ["reports"]}}
    with override_settings(PINNING_REPLICAS={"default": members}):
        for _ in range(2):
            with pinning_scope():
                before = where()
                assert of_group() == "replica2"
                assert where() == before


@GROUPS
def test_pinned_group_reads_its_stale_replica(visit: Visit) -> None:
    def act(request: Any) -> tuple[str, str]:
        Book.objects.create()
        return where(), of_group()

    assert visit(act) == ("default", "replica2")


@GROUPS
@pytest.mark.parametrize(("group", "using"), [("typo", None), ("", None), ("reports", "users")])
def test_unknown_group_is_an_error_on_entry(group: str, using: str | None) -> None:
    block = use_replica(using, group=group)
    with pytest.raises(ValueError, match=r"reports|is not a primary"), block:
        pass


@override_settings(PINNING_REPLICAS=[])
def test_group_of_a_site_without_replicas_is_the_primary() -> None:
    assert of_group() == "default"


def test_placements_are_parsed() -> None:
    (spec,) = parse_pools(
        {"default": {"a": 2, "b": {"weight": 0, "tier": 2}, "c": {"groups": ["g"]}}}
    )
    assert spec.weights == {"a": 2, "b": 0, "c": 1}
    assert spec.placements == {"b": Placement(2), "c": Placement(1, ("g",))}


# Routers that return a replica


class FlagRouter:
    """Names a replica only while a flag is set, as a middleware would for some requests."""

    flag = False

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return "replica1" if self.flag else None


@override_settings(DATABASE_ROUTERS=[ROUTER, f"{__name__}.FlagRouter"])
def test_replica_returned_by_another_router_is_its_pool_and_logged_once(
    visit: Visit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(routers, "_logged", set())
    caplog.set_level(logging.WARNING, "pinning_middleware")
    assert seen_by(visit, 2) == {"replica1", "replica2"}
    assert caplog.messages == []
    monkeypatch.setattr(FlagRouter, "flag", True)
    assert seen_by(visit, 2) == {"replica1", "replica2"}
    assert visit(method="post") == "default"
    (message,) = caplog.messages
    assert message.startswith("FlagRouter.db_for_read() returns the replica 'replica1'.")
