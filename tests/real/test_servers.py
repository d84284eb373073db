"""Read-your-writes under real servers: threads of gunicorn, and uvicorn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from .conftest import NODES, PostgreSQL, empty_tables, eventually, missing
from .sample import ROOT, Client, free_port, is_listening

pytestmark = pytest.mark.real

REPLICAS = {"replica1", "replica2"}
COMMANDS = {
    "gunicorn": (
        *("gunicorn", "--worker-class", "gthread", "--workers", "2", "--threads", "4"),
        *("--bind", "127.0.0.1:{port}", "tests.real.served_site:wsgi"),
    ),
    "uvicorn": (
        *("uvicorn", "--port", "{port}", "--no-access-log", "--lifespan", "off"),
        "tests.real.served_site:asgi",
    ),
}
OTHER_COMMANDS = {
    "daphne": ("daphne", "--port", "{port}", "tests.real.served_site:asgi"),
    "granian": (
        *("granian", "--interface", "asgi", "--port", "{port}", "--no-ws"),
        "tests.real.served_site:asgi",
    ),
    "hypercorn": ("hypercorn", "--bind", "127.0.0.1:{port}", "tests.real.served_site:asgi"),
}
# A thread of gunicorn keeps its connections; under ASGI each request has its own threads.
CONN_MAX_AGE = {"gunicorn": None}


class Served:
    """The site under a server."""

    def __init__(self, kind: str, pg: PostgreSQL, log: Path) -> None:
        self.kind, self.pg, self.log = kind, pg, log
        self.port = free_port()
        databases = {
            "default" if node == "primary" else node: {
                **pg.cluster.database(node, "site"),
                "CONN_MAX_AGE": CONN_MAX_AGE.get(kind, 0),
            }
            for node in NODES.values()
        }
        environ = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.real.served_settings",
            "SERVED_DATABASES": json.dumps(databases),
            # The name of its sessions on the servers.
            "PGAPPNAME": f"served-{self.port}",
        }
        command = [part.format(port=self.port) for part in (COMMANDS | OTHER_COMMANDS)[kind]]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-m", *command],
                cwd=ROOT,
                env=environ,
                stdout=output,
                stderr=subprocess.STDOUT,
                # With a process group of its own.
                start_new_session=True,
            )

    @property
    def sessions(self) -> int:
        """The number of its sessions on the primary."""
        count: Any = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        return int(self.pg["pg"].execute(count, (f"served-{self.port}",))[0][0])

    def stop(self) -> None:
        """Stop the server, and the processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    @property
    def names(self) -> dict[int, str]:
        return {node.port: name for name, node in self.pg.cluster.nodes.items()}

    def client(self) -> Client:
        return Client(f"http://127.0.0.1:{self.port}")

    def ask(self, client: Client, path: str) -> tuple[bool, str]:
        """Return whether the title was found, and the alias of the server."""
        answer = client.get(path)
        assert answer.status == 200, answer.text
        found = answer.json()
        return found["found"], self.names[found["port"]]


@contextmanager
def running_site(kind: str, pg: PostgreSQL, folder: Path) -> Iterator[Served]:
    try:
        __import__(kind)
    except ImportError:
        missing(f"{kind} is missing: pip install {kind}")
    site = Served(kind, pg, folder / "log")
    try:
        assert eventually(lambda: is_listening(site.port) or site.process.poll() is not None)
        assert site.process.poll() is None, site.log.read_text()
        yield site
    finally:
        site.stop()
        empty_tables("pg")


@pytest.fixture(params=COMMANDS)
def served(pg: PostgreSQL, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    with running_site(request.param, pg, tmp_path) as site:
        yield site


def views(served: Served) -> tuple[str, ...]:
    return ("sync", "async")


def work(served: Served, number: int, rounds: int, seen: list[tuple[str, bool, str]]) -> None:
    """Write and read six times per round as one user; record the servers and results."""
    client = served.client()
    for turn in range(rounds):
        view = views(served)[(number + turn) % 2]
        title = f"{number}-{turn}"
        found, by = served.ask(client, f"/{view}/write/{title}/")
        seen.append(("write", found, by))
        for _ in range(6):
            found, by = served.ask(client, f"/{view}/read/{title}/")
            seen.append(("read", found, by))


def run_clients(
    served: Served, disturb: Callable[[threading.Event], None], rounds: int
) -> list[tuple[str, bool, str]]:
    """Run six clients while the databases are disturbed."""
    seen: list[tuple[str, bool, str]] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def client(number: int) -> None:
        try:
            work(served, number, rounds, seen)
        except BaseException as error:
            errors.append(error)

    def disturbing() -> None:
        try:
            disturb(done)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    other = threading.Thread(target=disturbing)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join(120)
    done.set()
    other.join(60)
    assert errors == [], served.log.read_text()[-3000:]
    return seen


def check_results(seen: list[tuple[str, bool, str]], rounds: int) -> None:
    assert len(seen) == 6 * rounds * 7
    assert [one for one in seen if not one[1]] == []
    assert {by for kind, _, by in seen if kind == "write"} == {"primary"}


def test_writes_are_visible_while_one_replica_lags(served: Served) -> None:
    pg = served.pg

    def lag(done: threading.Event) -> None:
        while True:
            for alias in ("pg1", "pg2"):
                pg[alias].pause()
                ended = done.wait(0.15)
                pg[alias].resume()
                if ended:
                    return

    seen = run_clients(served, lag, rounds=15)
    check_results(seen, rounds=15)
    assert {by for kind, _, by in seen if kind == "read"} >= REPLICAS


def test_writes_are_visible_while_both_replicas_lag(served: Served) -> None:
    served.pg.pause()
    try:
        seen = run_clients(served, lambda done: None, rounds=3)
    finally:
        served.pg.resume()
    check_results(seen, rounds=3)
    assert {by for _, _, by in seen} == {"primary"}


def test_requests_succeed_while_replicas_fail(served: Served) -> None:
    pg = served.pg

    def break_things(done: threading.Event) -> None:
        while True:
            for alias in ("pg1", "pg2"):
                site = "FROM pg_stat_activity WHERE datname = 'site'"
                pg[alias].execute(f"SELECT pg_terminate_backend(pid) {site}")
                done.wait(0.05)
                pg[alias].stop("immediate")
                ended = done.wait(0.2)
                pg[alias].start()
                if ended:
                    return

    seen = run_clients(served, break_things, rounds=12)
    check_results(seen, rounds=12)
    assert {by for kind, _, by in seen if kind == "read"} & REPLICAS


def test_replicas_are_used_once_caught_up(served: Served) -> None:
    client = served.client()
    for view in views(served):
        assert served.ask(client, f"/{view}/write/{view}/") == (True, "primary")
        served.pg.wait_for()
        answers = [served.ask(client, f"/{view}/read/{view}/") for _ in range(6)]
        assert {found for found, _ in answers} == {True}
        assert {by for _, by in answers} <= REPLICAS
    visitor = served.client()
    assert {served.ask(visitor, "/sync/read/sync/")[1] for _ in range(6)} == REPLICAS
    assert visitor.cookies == {}


def test_server_shuts_down_cleanly(served: Served) -> None:
    client = served.client()
    for view in views(served):
        served.ask(client, f"/{view}/write/{view}/")
        served.ask(client, f"/{view}/read/{view}/")
    if served.kind in CONN_MAX_AGE:
        assert served.sessions
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(30) in (0, -signal.SIGTERM)
    log = served.log.read_text()
    assert "Traceback" not in log
    assert "Warning" not in log
    assert not is_listening(served.port)
    assert eventually(lambda: served.sessions == 0)


@pytest.mark.parametrize("kind", ["uvicorn", *OTHER_COMMANDS])
def test_closer_of_a_response_belongs_to_its_request(
    pg: PostgreSQL, kind: str, tmp_path: Path
) -> None:
    """ASGI servers close a response in another thread, without the context of the view."""
    with running_site(kind, pg, tmp_path) as site:
        for view in views(site):
            assert site.ask(site.client(), f"/{view}/close/{view}/") == (True, "primary")

        def closed() -> list[tuple[bool, str]]:
            found = site.client().get("/closed/").json()["closed"]
            return [(is_pinned, site.names[port]) for is_pinned, port in found]

        assert eventually(lambda: len(closed()) == 2)
        assert closed() == [(True, "primary")] * 2
