"""Known defects of similar packages, which this package does not have."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.signing import Signer
from django.db import router, transaction
from django.http import HttpResponse, HttpResponseRedirect
from django.test import override_settings
from django.urls import path
from django.views import View

from pinning_middleware import (
    ReplicaWriteError,
    is_pinned,
    pinning_scope,
    use_primary,
    use_replica,
)
from pinning_middleware.conf import conf
from pinning_middleware.scopes.scope import entered_scope
from tests.app.models import Book
from tests.conftest import Browser, Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


def write(request: Any = None) -> str:
    Book.objects.create(title="x")
    return "written"


class TestDjangoMultidbRouter:
    pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

    def test_nested_use_primary_ends_with_its_block(self) -> None:
        """django-multidb-router: the thread stays pinned forever."""
        with pinning_scope():
            with use_primary():
                with use_primary():
                    pass
                assert where() == "default"
            assert is_replica(where())

    def test_thread_is_not_pinned_after_the_response(self, visit: Visit) -> None:
        visit(write, "post")
        assert entered_scope() is None
        visit.browser.cookies.clear()
        assert is_replica(visit())

    def test_reads_in_a_transaction_use_the_primary(self, visit: Visit) -> None:
        assert visit(lambda request: transaction.atomic(where)()) == "default"

    def test_write_in_a_get_pins(self, visit: Visit) -> None:
        visit(write, "get")
        assert visit() == "default"

    @pytest.mark.parametrize("value", ["y", "1", "true", "pinned"])
    def test_forged_cookie_does_not_pin(self, visit: Visit, value: str) -> None:
        visit.browser.cookies["pinning"] = value
        assert is_replica(visit())
        forged = Signer(key="guessed", salt="pinning_middleware.token")
        visit.browser.cookies["pinning"] = forged.sign_object({"default": [time.time() + 60]})
        assert is_replica(visit())

    def test_async_views_are_pinned(self, browser: Browser, do: Callable[..., str]) -> None:
        seen = []

        async def act(request: Any) -> str:
            await Book.objects.acreate(title="x")
            seen.append(where())
            return "done"

        async def read(request: Any) -> int:
            seen.append(where())
            return await Book.objects.acount()

        browser.get(f"/async/{do(act)}/")
        assert browser.get(f"/async/{do(read)}/").content == b"1"
        assert seen == ["default", "default"]

    def test_refresh_after_create_reads_the_primary(self, visit: Visit) -> None:
        visit(lambda request: Book.objects.create(title="x").refresh_from_db())

    def test_response_with_the_cookie_varies_by_cookie(self, visit: Visit) -> None:
        visit(write)
        assert visit.response.headers["Vary"] == "Cookie"

    @pytest.mark.parametrize("alias", ["default", "users", "elsewhere", "slave"])
    def test_unrelated_aliases_can_migrate(self, alias: str) -> None:
        assert router.allow_migrate(alias, "app")

    def test_override_settings_takes_effect(self, visit: Visit) -> None:
        with override_settings(PINNING_REPLICAS=["replica2"]):
            assert {visit(), visit(), visit()} == {"replica2"}

    def test_missing_setting_is_looked_up_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """django-multidb-router: each read causes a failed lookup."""
        assert conf.seconds == 15
        looked = []
        with pinning_scope():
            where()
        monkeypatch.setattr(type(conf), "_get", lambda self, name: looked.append(name))
        with pinning_scope():
            where()
            where()
        assert looked == []


class Overridden(View):
    def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        return super().dispatch(request, *args, **kwargs)

    def get(self, request: Any) -> HttpResponse:
        return HttpResponse(where())


def decorated_in_part(request: Any) -> HttpResponse:
    inside = use_primary(where)()
    return HttpResponse(f"{inside} {where()}")


urlpatterns = [
    path("class/", use_primary(Overridden.as_view())),
    path("part/", decorated_in_part),
]


class TestDjangoReplicated:
    pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

    def test_write_in_a_get_is_allowed(self, visit: Visit) -> None:
        assert visit(write, "get") == "written"
        assert visit.response.status_code == 200

    @pytest.mark.parametrize("header", ["X-Replicated", "X-Database", "Pinning-Token"])
    def test_write_with_any_header_is_allowed(self, visit: Visit, header: str) -> None:
        assert visit(write, "post", headers={header: "replica"}) == "written"

    def test_pin_is_valid_for_several_requests(self, visit: Visit) -> None:
        visit(write, "post")
        assert [visit(), visit(), visit()] == ["default"] * 3

    @pytest.mark.parametrize("redirects", [False, True])
    def test_pin_is_set_for_any_response(
        self, browser: Browser, do: Callable[..., str], redirects: bool
    ) -> None:
        """django-replicated: on redirects only."""

        def act(request: Any) -> HttpResponse:
            write()
            return HttpResponseRedirect("/") if redirects else HttpResponse()

        browser.post(f"/sync/{do(act)}/")
        assert browser.get(f"/sync/{do(lambda request: where())}/").content == b"default"

    @pytest.mark.urls(__name__)
    def test_class_based_views_can_be_overridden(self, browser: Browser) -> None:
        assert browser.get("/class/").content == b"default"

    @pytest.mark.urls(__name__)
    def test_decorator_ends_with_its_function(self, browser: Browser) -> None:
        inside, after = browser.get("/part/").content.decode().split()
        assert inside == "default"
        assert is_replica(after)

    def test_migrations_do_not_run_on_replicas(self) -> None:
        assert not router.allow_migrate("replica1", "app")

    def test_rejected_query_leaves_its_replica_in_rotation(self, visit: Visit) -> None:
        """django-replicated: the replica is marked down for a minute."""

        def act(request: Any) -> None:
            with pytest.raises(ReplicaWriteError):
                Book.objects.using("replica1").create(title="x")

        visit(act)
        assert {visit(), visit()} == {"replica1", "replica2"}


class TestOthers:
    pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

    def test_makara_parallel_requests_find_the_pin(self, visit: Visit) -> None:
        visit(write)
        for _ in range(3):
            assert visit() == "default"

    @override_settings(PINNING_SECONDS=100)
    def test_makara_cookie_name_follows_the_setting(self, visit: Visit) -> None:
        visit(write)
        assert visit.response.cookies["pinning"]["max-age"] in (100, 101)

    def test_mediawiki_token_is_independent_of_the_client_address(
        self, new_browser: Callable[..., Browser], do: Callable[..., str]
    ) -> None:
        """Another address and another browser, for example on another network."""
        browser = new_browser()
        browser.get(f"/sync/{do(write)}/", REMOTE_ADDR="192.0.2.1", headers={"user-agent": "one"})
        response = browser.get(
            f"/sync/{do(lambda request: where())}/",
            REMOTE_ADDR="192.0.2.2",
            headers={"user-agent": "other"},
        )
        assert response.content == b"default"

    def test_laravel_jobs_share_no_state(self) -> None:
        with pinning_scope(isolated=True):
            write()
        with pinning_scope(isolated=True):
            assert not is_pinned()
            assert is_replica(where())

    def test_state_is_not_shared_by_process_or_class(self) -> None:
        """A decision in one thread does not affect others."""
        seen = []
        with pinning_scope(), use_primary():
            write()
            thread = threading.Thread(target=lambda: seen.append(where()))
            thread.start()
            thread.join()
        assert is_replica(seen[0])

    def test_post_that_only_reads_may_use_replicas(self, visit: Visit) -> None:
        assert is_replica(visit(use_replica(lambda request: where()), "post"))
        assert not visit.browser.cookies

    def test_kitsune_pin_propagates_to_a_task(self) -> None:
        async def job(token: str | None) -> str:
            with pinning_scope(token):
                return where()

        with pinning_scope() as scope:
            write()
        assert async_to_sync(job)(scope.token) == "default"
