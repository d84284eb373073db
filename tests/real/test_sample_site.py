"""The sample site, started from the command line and used over HTTP."""

from __future__ import annotations

import base64
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.real.sample import (
    REPLICAS,
    Client,
    Site,
    eventually,
    is_listening,
    open_folder,
    servers_of,
)

pytestmark = pytest.mark.real

SCRIPT = {"Authorization": "Basic " + base64.b64encode(b"grace:grace").decode()}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_folder() as folder, Site(folder) as site:
        yield site.ready()


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def paused(site: Site) -> Iterator[Site]:
    """The site with replicas that have caught up and are paused."""
    site.pause()
    yield site
    site.resume()


def answered_by(page: str) -> set[str]:
    """Return the databases that the page's panel lists for its reads."""
    here = page[page.index("<h2>This page") : page.index("What this page asked")]
    return set(re.findall(r'class="db db-(\w+)"', here))


def post(client: Client, text: str) -> str:
    """Post in the browser, and return the page after the redirect."""
    answer = client.post_form("/", text=text)
    assert re.search(r"/(#message-\d+)?$", answer.url)
    return answer.text


def test_anonymous_users_read_replicas_round_robin(site: Site) -> None:
    visitor = site.browser()
    pages = [visitor.get("/").text for _ in range(4)]
    assert all("Is the new board up?" in page for page in pages)
    assert set[str]().union(*map(answered_by, pages)) == set(REPLICAS)
    assert "pinning" not in visitor.cookies


def test_message_is_visible_at_once_to_its_author_only(paused: Site) -> None:
    ada, visitor = paused.browser(), paused.browser()
    ada.sign_in("ada")
    page = post(ada, "Only I can see this")
    assert "Only I can see this" in page
    assert answered_by(page) == {"default"}
    assert "You have written lately" in page
    assert ":" in ada.cookies["pinning"]

    assert "Only I can see this" not in visitor.get("/").text
    assert answered_by(visitor.get("/").text) <= set(REPLICAS)

    ada.switch_pinning(on=False)
    page = ada.get("/").text
    assert "Only I can see this" not in page
    assert "Signed in as <b>ada</b>" in page
    assert answered_by(page) <= set(REPLICAS)
    ada.switch_pinning(on=True)
    assert "Only I can see this" in ada.get("/").text

    ada.switch_pinning(on=False)
    paused.resume()
    assert "Only I can see this" in ada.get("/").text
    assert "Only I can see this" in visitor.get("/").text


def test_page_after_a_redirect_shows_the_write(site: Site) -> None:
    ada = site.browser()
    ada.sign_in("ada")
    page = post(ada, "Look below")
    assert "Before it: POST /" in page
    assert "INSERT INTO board_message" in page
    assert "Before it" not in ada.get("/").text


def test_message_without_pinning_is_saved_and_not_visible(paused: Site) -> None:
    ada = paused.browser()
    ada.sign_in("ada")
    ada.switch_pinning(on=False)
    assert "Out of sight" not in post(ada, "Out of sight")
    ada.switch_pinning(on=True)
    assert "Out of sight" in ada.get("/").text


def test_user_in_two_browsers(paused: Site) -> None:
    """Pins of a user are stored in the cache under that user only."""
    desk, phone, other = paused.browser(), paused.browser(), paused.browser()
    desk.sign_in("ada")
    phone.sign_in("ada")
    other.sign_in("admin")
    post(desk, "On both of my screens")
    assert "pinning" in desk.cookies
    page = phone.get("/").text
    assert "On both of my screens" in page
    assert answered_by(page) == {"default"}
    assert "You have written lately" in page
    assert re.search(r'data-seconds="(60\.0|[1-5]\d\.\d)"', page)
    assert "On both of my screens" not in paused.browser().get("/").text


def counted(client: Client, **data: str) -> tuple[int, str]:
    """Post and count; return the count of the background task, and its database."""
    answer = client.post_form("/", text="One more", count="", **data)
    found = re.compile(r'counted <b>(\d+)</b> messages? of yours,\s+on <span class="db db-(\w+)"')
    address = answer.url.removeprefix(client.url)
    assert eventually(lambda: found.search(client.get(address).text))
    match = found.search(client.get(address).text)
    assert match
    return int(match[1]), match[2]


def test_background_task_counts_writes_of_the_request(paused: Site) -> None:
    ada = paused.browser()
    ada.sign_in("ada")
    before, alias = counted(ada)
    assert alias == "default"
    assert counted(ada) == (before + 1, "default")
    ada.switch_pinning(on=False)
    stale, alias = counted(ada)
    assert (stale < before + 2, alias in REPLICAS) == (True, True)
    ada.switch_pinning(on=True)
    assert counted(ada) == (before + 3, "default")


def test_unknown_count_is_not_shown(site: Site) -> None:
    assert "counted" not in site.browser().get("/?count=nonsense").text


def test_script_without_cookies(paused: Site) -> None:
    """It sends the token header; without it, it is an anonymous user."""
    added = paused.browser().post("/api/messages/", {"text": "By header"}, SCRIPT)
    token = added.headers["Pinning-Token"]
    assert "Pinning-Token" in added.headers["Vary"]
    answer = paused.browser().get("/api/messages/", {"Pinning-Token": token}).json()
    assert (answer["pinned"], answer["messages"][0]["text"]) == (True, "By header")
    assert not paused.browser().get("/api/messages/").json()["pinned"]
    assert not paused.browser().get("/api/messages/", {"Pinning-Token": "forged"}).json()["pinned"]


def test_writes_of_a_script_are_visible_in_the_browser_of_its_user(paused: Site) -> None:
    grace = paused.browser()
    grace.sign_in("grace")
    paused.browser().post("/api/messages/", {"text": "From my script"}, SCRIPT)
    assert "From my script" in grace.get("/").text


def test_api_follows_the_same_rules(paused: Site) -> None:
    script, visitor = paused.browser(), paused.browser()
    added = script.post("/api/messages/", {"text": "From a script"}, SCRIPT)
    assert (added.status, added.json()["author"]) == (201, "grace")
    assert "private" in added.headers["Cache-Control"]
    assert "Cookie" in added.headers["Vary"]

    answer = script.get("/api/messages/").json()
    assert (answer["pinned"], answer["read_from"]) == (True, ["default"])
    assert answer["messages"][0]["text"] == "From a script"
    assert script.get("/api/whoami/", SCRIPT).json()["user"] == "grace"

    answer = visitor.get("/api/messages/").json()
    assert not answer["pinned"]
    assert set(answer["read_from"]) <= set(REPLICAS)
    assert answer["messages"][0]["text"] != "From a script"
    assert visitor.get("/api/whoami/").json()["user"] is None


@pytest.mark.parametrize("header", ["", "Basic nonsense", "Basic YWRhOndyb25n", "Bearer x"])
def test_api_requires_a_user(site: Site, header: str) -> None:
    answer = site.browser().post("/api/messages/", {"text": "x"}, {"Authorization": header})
    assert answer.status == 401


def test_api_rejects_an_empty_message(site: Site) -> None:
    assert site.browser().post("/api/messages/", {"text": ""}, SCRIPT).status == 400


def test_anonymous_users_are_redirected_to_sign_in(site: Site) -> None:
    visitor = site.browser()
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', visitor.get("/sign-in/").text)
    assert token
    answer = visitor.post("/", {"csrfmiddlewaretoken": token[1], "text": "x"})
    assert "/sign-in/?next=/" in answer.url


def test_admin_has_the_panel(paused: Site) -> None:
    admin = paused.browser()
    admin.sign_in("admin")
    page = admin.post_form("/admin/board/message/add/", author="1", text="By the admin").text
    assert "By the admin" in page
    assert answered_by(page) == {"default"}


def test_replica_status_changes_nothing(site: Site) -> None:
    visitor = site.browser()
    answer = visitor.get("/panel/status/")
    assert "Set-Cookie" not in answer.headers
    assert visitor.cookies == {}
    assert answer.json()["error"] is None
    assert [row["alias"] for row in answer.json()["replicas"]] == list(REPLICAS)


def test_paused_replica_falls_behind(paused: Site) -> None:
    grace = paused.browser()
    grace.post("/api/messages/", {"text": "Behind"}, SCRIPT)
    assert eventually(lambda: paused.status()["replica1"]["seconds_behind"] > 0)
    assert paused.status()["replica1"]["bytes_behind"] > 0


def test_delayed_replica_replays_later(site: Site) -> None:
    for alias in REPLICAS:
        assert site.control(alias, "delay", seconds="2").status == 200
    try:
        assert eventually(lambda: site.status()["replica1"]["delay"] == 2)
        grace, visitor = site.browser(), site.browser()
        assert grace.post("/api/messages/", {"text": "Late"}, SCRIPT).status == 201
        assert "Late" not in visitor.get("/").text
        assert eventually(lambda: "Late" in visitor.get("/").text)
    finally:
        for alias in REPLICAS:
            site.control(alias, "delay", seconds="0")


def test_controls_reject_unknown_values(site: Site) -> None:
    assert site.control("default", "pause").status == 404
    assert site.control("replica1", "delay", seconds="soon").status == 400
    assert site.browser().post("/panel/replica1/pause/", {}).status == 403
    assert not site.status()["replica1"]["paused"]


def test_site_runs_on_existing_databases_without_superuser(site: Site, folder: Path) -> None:
    """One URL each; the controls report what is missing instead of failing."""
    server = "127.0.0.1:{}".format
    primary, replica = (server(site.database_ports[name]) for name in ("primary", "replica1"))
    with psycopg.connect(f"postgresql://postgres@{primary}/postgres") as connection:
        connection.autocommit = True
        connection.execute("CREATE ROLE plain LOGIN")
        connection.execute("CREATE DATABASE other OWNER plain")
    assert eventually(site.caught_up)
    with Site(
        folder,
        DATABASE_URL=f"postgresql://plain@{primary}/other",
        REPLICA1_URL=f"postgresql://plain@{replica}/other",
    ) as other:
        other.ready()
        assert not other.folder.exists()
        assert eventually(lambda: "Is the new board up?" in other.browser().get("/").text)
        answer = other.control("replica1", "pause")
        assert answer.status == 403
        assert "superuser" in answer.json()["error"]
        assert other.end(signal.SIGINT) == 0
    assert site.browser().get("/").status == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_all_processes_and_restart_is_fast(
    folder: Path, number: signal.Signals
) -> None:
    with Site(folder) as first:
        first.ready()
        assert len(servers_of(first.folder)) == 3
        first.browser().post("/api/messages/", {"text": "Kept"}, SCRIPT)
        assert first.end(number) == 0
    assert "nothing is left running" in first.output
    assert "Traceback" not in first.output
    assert servers_of(first.folder) == []
    assert not any(map(is_listening, (first.port, *first.database_ports.values())))
    with Site(folder) as second:
        second.ready()
        assert "Making" not in second.output
        assert eventually(lambda: "Kept" in second.browser().get("/").text)


@pytest.mark.parametrize("moment", ["Starting PostgreSQL", "The primary listens", "Creating the"])
def test_signal_during_the_start_ends_all_processes(folder: Path, moment: str) -> None:
    with Site(folder) as site:
        assert eventually(lambda: moment in site.output)
        assert site.end(signal.SIGINT) == 0
        assert "nothing is left running" in site.output
        assert "Traceback" not in site.output
    assert not any(map(is_listening, (site.port, *site.database_ports.values())))


def test_port_in_use_is_reported_before_the_start(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Site(folder, port) as site:
            assert site.process.wait(30) == 1
        assert f"Port {port} can't be used" in site.output
        assert f"PORT={port + 1}" in site.output
        assert not site.folder.exists()


def test_invalid_port_is_reported(folder: Path) -> None:
    with Site(folder, PORT="http") as site:
        assert site.process.wait(30) == 1
    assert "PORT must be a number up to 65535, not 'http'" in site.output
