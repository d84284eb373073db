"""The status page; ``tests/real`` opens it in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connections
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from freezegun.api import FrozenDateTimeFactory

import pinning_middleware
from pinning_middleware import signals, stats, status_page
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.routing.pools import pools
from pinning_middleware.servers.registry import registry
from pinning_middleware.utils import counters

pytestmark = pytest.mark.django_db(databases=["default", "replica1", "replica2"], transaction=True)

ALIASES = ("default", "replica1", "replica2")
FOLDER = Path(pinning_middleware.__file__).parent
PAGE, DATA = "/pinning/", "/pinning/data/"


@pytest.fixture(autouse=True)
def site() -> Iterator[None]:
    with override_settings(
        ROOT_URLCONF="tests.monitoring.urls",
        LOGIN_URL="sign-in",
        STATIC_URL="/static/",
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        TEMPLATES=[
            {"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}
        ],
        PINNING_STORES=["pinning_middleware.stores.CookieStore"],
    ):
        counters.reads.clear()
        stats.recent_events.clear()
        yield


def browser(**rights: bool) -> Client:
    """Return the client of a user with these permissions, who exists only on the primary."""
    client = Client()
    client.force_login(User.objects.create_user("ada", **rights))
    client.cookies.pop("pinning", None)
    return client


@pytest.fixture
def staff() -> Client:
    return browser(is_staff=True)


class Page(HTMLParser):
    """Return the tags of a page with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def token_of(html: str) -> str:
    (main,) = Page(html).of("main")
    return str(main["data-token"])


def get_with_queries(client: Client, address: str, **headers: str) -> tuple[Any, dict[str, int]]:
    """Return the response of a page, and the number of statements by database."""
    contexts = {alias: CaptureQueriesContext(connections[alias]) for alias in ALIASES}
    for context in contexts.values():
        context.__enter__()
    answer = client.get(address, headers=headers)
    for context in contexts.values():
        context.__exit__(None, None, None)
    return answer, {alias: len(context) for alias, context in contexts.items()}


# Access


def test_anonymous_users_are_redirected_to_the_login(staff: Client) -> None:
    answer = Client().get(PAGE)
    assert (answer.status_code, answer["Location"]) == (302, f"/sign-in/?next={PAGE}")
    assert Client().get(DATA)["Location"] == f"/sign-in/?next={DATA}"
    assert staff.get(PAGE).status_code == 200
    assert staff.get(DATA).status_code == 200


def test_users_who_are_not_staff() -> None:
    ada = browser()
    # A login page that redirects logged-in users would cause a redirect loop.
    assert ada.get(PAGE).status_code == 403
    with override_settings(ROOT_URLCONF="tests.monitoring.urls_with_admin"):
        assert ada.get(PAGE)["Location"] == f"/admin/login/?next={PAGE}"


def test_inactive_staff_has_no_access() -> None:
    assert browser(is_staff=True, is_active=False).get(PAGE).status_code in (302, 403)


def test_data_with_login_required_middleware() -> None:
    login_required = "django.contrib.auth.middleware.LoginRequiredMiddleware"
    client = browser(is_staff=True)
    token = token_of(client.get(PAGE).content.decode())
    from django.conf import settings

    with override_settings(MIDDLEWARE=[*settings.MIDDLEWARE, login_required]):
        assert Client().get(DATA, headers={"Pinning-Status": token}).status_code == 200
        assert Client().get(PAGE).status_code == 302


def test_token_expires_after_an_hour(staff: Client, clock: FrozenDateTimeFactory) -> None:
    token = token_of(staff.get(PAGE).content.decode())
    clock.tick(3599)
    assert Client().get(DATA, headers={"Pinning-Status": token}).status_code == 200
    clock.tick(2)
    assert Client().get(DATA, headers={"Pinning-Status": token}).status_code == 403
    # Also for staff with a session: the page has to be reloaded.
    answer = staff.get(DATA, headers={"Pinning-Status": f"{token}x"})
    assert (answer.status_code, answer.json()) == (403, {"error": "expired"})


# Overhead


def test_poll_runs_no_query_and_sets_no_cookie(staff: Client) -> None:
    token = token_of(staff.get(PAGE).content.decode())
    with override_settings(SESSION_SAVE_EVERY_REQUEST=True):
        answer, queries = get_with_queries(Client(), DATA, **{"Pinning-Status": token})
    assert queries == {"default": 0, "replica1": 0, "replica2": 0}
    assert not answer.cookies
    assert "no-store" in answer["Cache-Control"]


def test_page_reads_the_user_from_the_primary(staff: Client) -> None:
    answer, queries = get_with_queries(staff, PAGE)
    assert answer.status_code == 200
    assert queries == {"default": 1, "replica1": 0, "replica2": 0}
    assert "pinning" not in answer.cookies


# Content


def test_page_shows_servers_reads_and_events(staff: Client) -> None:
    pools()
    registry.mark_down(registry.endpoint("replica1", "default"), Fault.UNREACHABLE, 10, "<refused>")
    counters.reads["default", "replica2", None, Reason.ROUND_ROBIN] += 3
    signals.fell_back_to_primary.send("default", served="default", reason="no_replica")
    html = staff.get(PAGE).content.decode()
    assert "default: 1 of 2 replicas are in rotation. replica1: connecting to it fails." in html
    assert 'class="summary degraded"' in html
    assert "&lt;refused&gt;" in html
    assert re.search(
        r"<b>round_robin</b> <span>the next replica, round robin</span></th>\s*<td[^>]*>3</td>",
        html,
    )
    assert Reason.NO_REPLICA.description in html
    known = staff.get(DATA).json()
    assert {server["alias"]: server["state"] for server in known["servers"]} == {
        "default": "in",
        "replica1": "out",
        "replica2": "in",
    }
    assert known["by_reason"][0]["name"] == "round_robin"
    assert known["by_server"][2]["reads"] == 3
    assert [event["kind"] for event in known["events"]] == [
        "fell_back_to_primary",
        "replica_removed",
    ]


def test_page_without_replicas_or_disabled(staff: Client) -> None:
    with override_settings(PINNING_REPLICAS=[]):
        assert "PINNING_REPLICAS is empty" in staff.get(PAGE).content.decode()
    with override_settings(PINNING_ENABLED=False):
        assert staff.get(DATA).json()["summary"]["state"] == "degraded"


def test_reasons_have_descriptions() -> None:
    assert all(reason.description for reason in Reason)


def test_events_have_titles() -> None:
    without_event = {"replica_wait_finished", "token_rejected"}
    assert set(status_page.EVENTS) == set(signals.__all__) - without_event


# Markup and files


def test_page_has_no_external_or_inline_resources(staff: Client) -> None:
    page = Page(staff.get(PAGE).content.decode())
    for tag, attributes in page.tags:
        assert not any(name == "style" or name.startswith("on") for name in attributes), tag
        for name in ("src", "href"):
            address = attributes.get(name)
            assert address is None or address.startswith(("/static/", "#", "data:")), address
    assert "style" not in dict(page.tags)
    assert [script["src"] for script in page.of("script")] == [
        "/static/pinning_middleware/status.js"
    ]
    for name in ("status.js", "status.css"):
        text = (FOLDER / "static" / "pinning_middleware" / name).read_text()
        assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|\.style\b|@import|eval\(", text)


def test_tables_have_roles_for_screen_readers(staff: Client) -> None:
    page = Page(staff.get(PAGE).content.decode())
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    tables = page.of("table")
    assert len(tables) == 4
    assert all(table["role"] == "table" and table["aria-labelledby"] in ids for table in tables)
    assert all(head["scope"] in ("col", "row") for head in page.of("th"))
    (summary,) = [a for _, a in page.tags if a.get("aria-live")]
    assert (summary["aria-live"], summary["role"]) == ("polite", "status")


def test_script_uses_ids_of_the_page(staff: Client) -> None:
    script = (FOLDER / "static" / "pinning_middleware" / "status.js").read_text()
    page = Page(staff.get(PAGE).content.decode())
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert set(re.findall(r'(?:getElementById|setText)\("([\w-]+)"', script)) <= ids
    assert status_page.TOKEN_HEADER in script


def test_page_reloads_without_javascript(staff: Client) -> None:
    html = staff.get(PAGE).content.decode()
    assert re.search(r'<noscript><meta http-equiv="refresh" content="\d+"></noscript>', html)


def test_static_files_and_templates_are_package_data() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for kind in ("static", "templates"):
        assert f"{kind}/pinning_middleware/*" in project


def test_url_checks_pass() -> None:
    call_command("check", tags=["urls"])
