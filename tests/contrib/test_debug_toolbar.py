"""The panel in the real toolbar, beside its built-in panels, under WSGI and ASGI."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.apps import apps
from django.db import connections
from django.http import HttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import include, path

from pinning_middleware.reasons import Reason
from pinning_middleware.scopes.scope import enter
from pinning_middleware.utils import counters
from tests.app.models import Account, Book
from tests.app.urls import urlpatterns as of_the_app
from tests.conftest import Browser, is_replica
from tests.settings import INSTALLED_APPS, MIDDLEWARE

from .pages import load

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

# The settings of the page.
PAGE_OF_DOCS = load("how-to/integrations.md", "Django Debug Toolbar")[""]
TOOLBAR = PAGE_OF_DOCS.MIDDLEWARE[1]
PAGE = "<html><body>done</body></html>"
APPS = [*INSTALLED_APPS, "django.contrib.staticfiles", PAGE_OF_DOCS.INSTALLED_APPS[1]]
SETTINGS: dict[str, Any] = {
    "MIDDLEWARE": [*PAGE_OF_DOCS.MIDDLEWARE, *MIDDLEWARE[1:]],
    "DEBUG_TOOLBAR_PANELS": PAGE_OF_DOCS.DEBUG_TOOLBAR_PANELS,
    "DEBUG_TOOLBAR_CONFIG": {"SHOW_TOOLBAR_CALLBACK": "tests.contrib.test_debug_toolbar.always"},
    "ROOT_URLCONF": __name__,
    "STATIC_URL": "static/",
    "TEMPLATES": [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
}


class Urls(list[Any]):
    """Imported on first use, because the toolbar requires its app to be installed."""

    def __iter__(self) -> Iterator[Any]:
        return iter([*of_the_app, path("__debug__/", include("debug_toolbar.urls"))])

    def __reversed__(self) -> Iterator[Any]:
        return reversed(list(self))


urlpatterns = Urls()


def always(request: Any) -> bool:
    return True


@contextmanager
def installed() -> Iterator[None]:
    """Install the toolbar with an empty store, and remove it afterwards."""
    # The toolbar's AppConfig.ready() reads the other settings.
    with override_settings(**SETTINGS), override_settings(INSTALLED_APPS=APPS):
        from debug_toolbar.store import MemoryStore

        enter(None)
        MemoryStore.clear()
        yield
        MemoryStore.clear()
    for connection in connections.all():
        # The attribute that its SQL panel sets on each connection.
        for name in ("cursor", "chunked_cursor", "_djdt_cursor", "_djdt_chunked_cursor"):
            connection.__dict__.pop(name, None)
    assert counters.observers == []


@pytest.fixture(autouse=True)
def toolbar() -> Iterator[None]:
    with installed():
        yield


def stats_of(request_id: str, panel: str = "PinningPanel") -> Any:
    """Return the toolbar's stored data of a request."""
    from debug_toolbar.store import get_store

    return get_store().panel(request_id, panel)


def last(panel: str = "PinningPanel") -> Any:
    from debug_toolbar.store import get_store

    return stats_of(list(get_store().request_ids())[-1], panel)


def shown(browser: Any = None) -> str:
    """Return the panel as loaded by the page."""
    from debug_toolbar.store import get_store

    request_id = list(get_store().request_ids())[-1]
    answer = Client().get(
        "/__debug__/render_panel/", {"request_id": request_id, "panel_id": "PinningPanel"}
    )
    return str(answer.json()["content"])


def read(request: Any = None) -> HttpResponse:
    list(Book.objects.filter(title="a title"))
    return HttpResponse(PAGE)


def write_and_read(request: Any = None) -> HttpResponse:
    Book.objects.create(title="new")
    return read()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_panel_shows_alias_and_reason_of_reads(
    browser: Browser, do: Callable[..., str], kind: str
) -> None:
    response = browser.get(f"/{kind}/{do(read)}/")
    assert "Pinning" in response.content.decode()
    (found,) = last()["reads"]
    assert is_replica(found["alias"])
    assert found["served"] == found["alias"]
    assert (found["pool"], found["role"], found["reason"]) == ("default", "replica", "round_robin")
    assert found["sql"].startswith('SELECT … FROM "app_book" WHERE')
    assert "1 replica" in response.content.decode()
    content = shown()
    assert f"{found['alias']}: round_robin" in content
    assert "the next replica, round robin" in content
    assert re.findall(r"<td>(inherited|outgoing)</td><td colspan=.3.>(.*?)</td>", content) == [
        ("inherited", "none"),
        ("outgoing", "none"),
    ]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_panel_shows_inherited_and_outgoing_pins(
    browser: Browser, do: Callable[..., str], kind: str
) -> None:
    browser.get(f"/{kind}/{do(write_and_read)}/")
    found = last()
    assert [each["reason"] for each in found["reads"]] == ["wrote"]
    assert found["pins"]["inherited"] == []
    (pin,) = found["pins"]["outgoing"]
    assert pin["pool"] == "default"
    assert 10 < pin["seconds"] <= 15
    assert "no position: lasts the full window" in shown()
    browser.get(f"/{kind}/{do(read)}/")
    found = last()
    assert [(each["served"], each["reason"]) for each in found["reads"]] == [("default", "pinned")]
    assert [each["pool"] for each in found["pins"]["inherited"]] == ["default"]
    assert found["pins"]["outgoing"] is None
    assert "an earlier request has written" in shown()
    assert "unchanged" in shown()


def test_panel_shows_one_pin_for_a_write_in_a_dry_run(
    new_browser: Callable[..., Browser], do: Callable[..., str]
) -> None:
    with override_settings(PINNING_REPLICAS=[], PINNING_DRY_RUN={"default": 2}):
        new_browser().get(f"/sync/{do(lambda request: Book.objects.create(title='new'))}/")
    assert [each["pool"] for each in last()["pins"]["outgoing"]] == ["default"]


@pytest.mark.usefixtures("clock")
def test_panel_does_not_change_the_cookie(browser: Browser, do: Callable[..., str]) -> None:
    """The cookie is the same with and without the toolbar."""
    address = f"/sync/{do(write_and_read)}/"
    browser.get(address)
    with_toolbar = browser.cookies["pinning"]["max-age"]
    browser.cookies.clear()
    with override_settings(MIDDLEWARE=MIDDLEWARE):
        browser.get(address)
    assert browser.cookies["pinning"]["max-age"] == with_toolbar


def test_panel_shows_servers(browser: Browser, do: Callable[..., str]) -> None:
    browser.get(f"/sync/{do(read)}/")
    assert [row["alias"] for row in last()["servers"]] == ["default", "replica1", "replica2"]
    content = shown()
    assert "replica1" in content
    assert "replica2" in content


def test_panel_with_two_pools(browser: Browser, do: Callable[..., str]) -> None:
    def both(request: Any) -> HttpResponse:
        list(Account.objects.using("users").all())
        return read()

    pools = {"default": ["replica1", "replica2"], "users": ["users_replica"]}
    with override_settings(PINNING_REPLICAS=pools):
        browser.get(f"/sync/{do(both)}/")
    found = last()
    assert [(each["pool"], each["reason"]) for each in found["reads"]] == [
        ("users", "explicit"),
        ("default", "round_robin"),
    ]
    assert shown().count("<th>Pool</th>") == 2


def test_parallel_requests_in_threads(do: Callable[..., str]) -> None:
    number = 4
    together = threading.Barrier(number)

    def act(request: Any) -> HttpResponse:
        mine = request.GET["n"]
        for _ in range(5):
            together.wait(30)
            list(Book.objects.filter(title=f"mine is {mine}"))
        return HttpResponse(PAGE)

    address = f"/sync/{do(act)}/"

    def visit(n: int) -> str:
        try:
            return str(Client().get(f"{address}?n={n}").content)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(number) as threads:
        list(threads.map(visit, range(number)))
    _expect_own_reads(number, 5)


def test_parallel_requests_in_one_event_loop(do: Callable[..., str]) -> None:
    number = 4

    async def act(request: Any) -> HttpResponse:
        mine = request.GET["n"]
        for _ in range(5):
            await asyncio.sleep(0)
            await asyncio.gather(
                _read_all(mine), sync_to_async(list)(Book.objects.filter(title=f"mine is {mine}"))
            )
        return HttpResponse(PAGE)

    async def _read_all(mine: str) -> None:
        async for _ in Book.objects.filter(title=f"mine is {mine}"):
            pass

    address = f"/async/{do(act)}/"

    async def visit() -> None:
        client = AsyncClient()
        await asyncio.gather(*(client.get(f"{address}?n={n}") for n in range(number)))

    async_to_sync(visit)()
    _expect_own_reads(number, 10)


def _expect_own_reads(requests: int, reads: int) -> None:
    from debug_toolbar.store import get_store

    found = [stats_of(request_id)["reads"] for request_id in get_store().request_ids()]
    assert [len(each) for each in found] == [reads] * requests
    texts = [{read["sql"] for read in each} for each in found]
    assert all(len(each) == 1 for each in texts)


def test_no_observer_without_the_panel(browser: Browser, do: Callable[..., str]) -> None:
    seen = []

    def act(request: Any) -> HttpResponse:
        seen.append(len(counters.observers))
        return read()

    address = f"/sync/{do(act)}/"
    browser.get(address)
    browser.cookies["djdtPinningPanel"] = "off"
    browser.get(address)
    assert seen == [1, 0]
    assert last() == {}


def test_panel_of_a_failing_view(browser: Browser, do: Callable[..., str]) -> None:
    def act(request: Any) -> HttpResponse:
        write_and_read()
        raise LookupError

    browser.client.raise_request_exception = False
    assert browser.get(f"/sync/{do(act)}/").status_code == 500
    found = last()
    assert [each["reason"] for each in found["reads"]] == ["wrote"]
    assert [each["pool"] for each in found["pins"]["outgoing"]] == ["default"]


def test_panel_with_the_middleware_after_the_toolbar(
    browser: Browser, do: Callable[..., str]
) -> None:
    """Pins are then unavailable, regardless of earlier requests of the thread."""
    read()
    with override_settings(MIDDLEWARE=[TOOLBAR, *MIDDLEWARE]):
        browser.get(f"/sync/{do(write_and_read)}/")
    assert [each["reason"] for each in last()["reads"]] == ["wrote"]
    assert last()["pins"] == {}
    assert "must come before the toolbar" in shown()


def test_panel_together_with_the_sql_panel(browser: Browser, do: Callable[..., str]) -> None:
    browser.get(f"/sync/{do(write_and_read)}/")
    queries = last("SQLPanel")["queries"]
    assert [query["alias"] for query in queries] == ["default", "default"]
    assert len(last()["reads"]) == 1


def test_panel_with_a_store_in_the_database(do: Callable[..., str]) -> None:
    """
    Writes to its table do not pin, and reads do not use a lagging replica. Under ASGI the
    toolbar itself rejects this store.
    """
    browser = Client()
    page = load("how-to/integrations.md", "The toolbar's store in the database")[""]
    config = {**SETTINGS["DEBUG_TOOLBAR_CONFIG"], **page.DEBUG_TOOLBAR_CONFIG}
    with override_settings(DEBUG_TOOLBAR_CONFIG=config), override_settings(INSTALLED_APPS=APPS):
        model = apps.get_model("debug_toolbar", "HistoryEntry")
        with connections["default"].schema_editor() as editor:
            editor.create_model(model)
        try:
            with override_settings(
                PINNING_IGNORED_TABLES=page.PINNING_IGNORED_TABLES,
                PINNING_PRIMARY_MODELS=page.PINNING_PRIMARY_MODELS,
            ):
                browser.get(f"/sync/{do(read)}/")
                assert [each["reason"] for each in last()["reads"]] == ["round_robin"]
                assert "pinning" not in browser.cookies
                assert "the next replica, round robin" in shown()
        finally:
            with connections["default"].schema_editor() as editor:
                editor.delete_model(model)


def test_panel_reasons_have_descriptions() -> None:

    assert all(reason.description for reason in Reason)
