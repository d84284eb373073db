"""The sample site as a process, and a client for it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.cookiejar import Cookie, CookieJar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, Request, build_opener

ROOT = Path(__file__).parents[2]
REPLICAS = ("replica1", "replica2")


def eventually(condition: Callable[[], object], timeout: float = 30) -> bool:
    """Poll until the condition holds; return whether it did in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that servers of another user may enter, as pytest's own are not."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def servers_of(folder: Path) -> list[str]:
    """The command lines of the PostgreSQL servers whose data is below the folder."""
    ps = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True)
    return [line for line in ps.stdout.splitlines() if f"-D {folder}/" in line]


class Site:
    """`python -m sample_site` on a port and with a data folder of its own."""

    def __init__(self, folder: Path, port: int | None = None, **environ: str) -> None:
        self.folder = folder / "data"
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "site.log"
        # Without the settings module of pytest-django and the databases of the environment.
        foreign = re.compile(r"DJANGO_SETTINGS_MODULE|DATABASE_URL|REPLICA\d+_URL")
        inherited = {key: value for key, value in os.environ.items() if not foreign.match(key)}
        own = {"PORT": str(self.port), "SAMPLE_DATA": str(self.folder)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "sample_site"],
                cwd=ROOT,
                env=inherited | own | environ,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end(signal.SIGTERM)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def ready(self) -> Self:
        """Wait until the site responds."""
        assert eventually(lambda: "Ctrl-C ends it." in self.output or self.ended, 90), self.output
        assert not self.ended, self.output
        return self

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def end(self, number: int) -> int:
        """Send a signal, wait, and return the exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    @property
    def database_ports(self) -> dict[str, int]:
        found = re.findall(r"(primary|replica\d) listens on port (\d+)", self.output)
        return {name: int(port) for name, port in found}

    def browser(self) -> Client:
        return Client(self.url)

    def status(self) -> dict[str, dict[str, Any]]:
        answer = self.browser().get("/panel/status/").json()
        return {replica["alias"]: replica for replica in answer["replicas"]}

    def control(self, alias: str, action: str, **data: str) -> Answer:
        return self.browser().post(f"/panel/{alias}/{action}/", data, {"Sample-Panel": "1"})

    def pause(self) -> None:
        """Wait until the replicas have caught up, and pause them."""
        assert eventually(self.caught_up), self.status()
        for alias in REPLICAS:
            assert self.control(alias, "pause").status == 200
        assert eventually(lambda: all(row["paused"] for row in self.status().values()))

    def resume(self) -> None:
        for alias in REPLICAS:
            assert self.control(alias, "resume").status == 200
        assert eventually(self.caught_up), self.status()

    def caught_up(self) -> bool:
        return all(row["bytes_behind"] == 0 for row in self.status().values())


class Answer(NamedTuple):
    """The response that a client received, after redirects."""

    status: int
    url: str
    headers: Any
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


class Client:
    """An HTTP client that stores cookies and follows redirects."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.jar = CookieJar()
        self._opener = build_opener(HTTPCookieProcessor(self.jar))

    @property
    def cookies(self) -> dict[str, str]:
        return {cookie.name: cookie.value or "" for cookie in self.jar}

    def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        return self._send(Request(self.url + path, headers=headers or {}))

    def post(
        self, path: str, data: dict[str, str], headers: dict[str, str] | None = None
    ) -> Answer:
        body = urlencode(data).encode()
        return self._send(Request(self.url + path, body, headers or {}, method="POST"))

    def post_form(self, path: str, **data: str) -> Answer:
        """Fetch the page with the form, then send it, as a browser does."""
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', self.get(path).text)
        assert token
        return self.post(path, {"csrfmiddlewaretoken": token[1]} | data)

    def sign_in(self, name: str) -> None:
        answer = self.post_form("/sign-in/", username=name, password=name)
        assert f"Signed in as <b>{name}</b>" in answer.text

    def switch_pinning(self, on: bool) -> None:
        """Submit the switch of the page."""
        if on:
            self.jar.clear("127.0.0.1", "/", "sample_pinning_off")
            return
        self.jar.set_cookie(cookie("sample_pinning_off", "1"))

    def _send(self, request: Request) -> Answer:
        try:
            response = self._opener.open(request, timeout=30)
        except HTTPError as error:
            response = error
        with response:
            text = response.read().decode()
            return Answer(response.status, response.url, response.headers, text)


def cookie(name: str, value: str) -> Cookie:
    """Return a cookie like one set by a script of the page."""
    return Cookie(
        version=0,
        name=name,
        value=value,
        port=None,
        port_specified=False,
        domain="127.0.0.1",
        domain_specified=False,
        domain_initial_dot=False,
        path="/",
        path_specified=True,
        secure=False,
        expires=None,
        discard=True,
        comment=None,
        comment_url=None,
        rest={},
    )
