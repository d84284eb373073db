"""Clusters that Patroni manages, with etcd, and HAProxy that asks Patroni's REST API.

with patroni_cluster(3) as cluster:
    cluster.switchover()
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

from sample_site.cluster import WATCH
from sample_site.node import HOST, SETTINGS, SUPERUSER, _first_number
from sample_site.node import _free_port as free_port
from sample_site.programs import Process, Programs, server_account

from .addresses import Address
from .daemons import Proxy, _program, _running, _spawned, haproxy
from .waiting import eventually, missing

# The least values that Patroni accepts: a leader that was killed is replaced after `ttl` seconds.
# https://patroni.readthedocs.io/en/latest/dynamic_configuration.html
DYNAMIC: Final = {"ttl": 20, "loop_wait": 1, "retry_timeout": 3}
TRUSTED: Final = ("host all all 127.0.0.1/32 trust", "host replication all 127.0.0.1/32 trust")
# Seconds until a cluster has a leader and its replicas stream.
START: Final = 60


@dataclass
class Member:
    """A PostgreSQL and the Patroni that manages it; `rest` is the port of its REST API."""

    name: str
    port: int
    rest: int
    folder: Path
    process: Process | None = None
    host: str = HOST

    def has_role(self, path: str) -> bool:
        """Return whether the REST API answers 200 to `/primary` or `/replica`."""
        return _get(f"http://{HOST}:{self.rest}{path}") is not None

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        place: dict[str, Any] = {"host": HOST, "port": self.port, "user": SUPERUSER}
        with psycopg.connect(
            **place, dbname="postgres", connect_timeout=5, autocommit=True
        ) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def kill(self) -> None:
        """Kill Patroni, and its PostgreSQL in the same moment."""
        assert self.process is not None
        postmaster = _first_number(self.lock)
        assert postmaster is not None
        self.process.kill()
        os.kill(postmaster, signal.SIGKILL)

    @property
    def lock(self) -> Path:
        return self.folder / "data" / "postmaster.pid"


class PatroniCluster:
    """The members, and two proxies: to the leader, and to the replicas."""

    def __init__(self, members: list[Member], configuration: Path, to: dict[str, Proxy]) -> None:
        self.members = members
        self.primary, self.replicas = to["/primary"], to["/replica"]
        self._configuration = configuration

    @property
    def leader(self) -> Member | None:
        return next((each for each in self.members if each.has_role("/primary")), None)

    def switchover(self) -> Member:
        """Make another member the leader, as administrators do; return it."""
        former = self.leader
        assert former is not None
        candidate = next(each for each in self.members if each is not former)
        # https://patroni.readthedocs.io/en/latest/patronictl.html#patronictl-switchover
        patronictl = [sys.executable, "-c", "from patroni.ctl import ctl; ctl()"]
        command = [*patronictl, "-c", str(self._configuration), "switchover", "site"]
        names = ["--leader", former.name, "--candidate", candidate.name, "--force"]
        done = subprocess.run([*command, *names], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert eventually(lambda: candidate.has_role("/primary"), 30), self.report(done.stdout)
        return candidate

    def report(self, what: str) -> str:
        """Return a message with the ends of the members' logs."""
        logs = [(each.folder / "patroni" / "log").read_text()[-2000:] for each in self.members]
        return "\n\n".join([what, *logs])


@contextmanager
def patroni_cluster(size: int, **recovery: str) -> Iterator[PatroniCluster]:
    """Run a cluster; `recovery` are settings of its standbys."""
    if importlib.util.find_spec("patroni") is None:
        missing("Patroni is missing: pip install 'patroni[etcd3]'")
    programs = Programs(server_account())
    programs.make_reachable()
    folder = programs.place(Path(tempfile.mkdtemp(prefix="pinning-patroni-")))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        etcd = stack.enter_context(_etcd())
        members = []
        for number in range(1, size + 1):
            place = programs.place(folder / f"pg{number}")
            members.append(Member(place.name, free_port(), free_port(), place))
        stack.enter_context(_stopped_at_the_end(programs, members, folder / "watch.log"))
        for member in members:
            configuration = _configure(programs, member, etcd, recovery)
            command = [*_as_account(programs), "-m", "patroni", str(configuration)]
            # PostgreSQL's data has a folder of its own, which outlives Patroni.
            own = programs.place(member.folder / "patroni")
            member.process = stack.enter_context(_spawned(Programs(), command, own, signal.SIGKILL))
        to = {
            role: stack.enter_context(
                haproxy(*members, rest=(f"OPTIONS {role}", [each.rest for each in members]))
            )
            for role in ("/primary", "/replica")
        }
        cluster = PatroniCluster(members, configuration, to)
        if not eventually(lambda: (to["/primary"].up, to["/replica"].up) == (1, size - 1), START):
            raise AssertionError(cluster.report("The cluster is not complete."))
        yield cluster


# Parts


@contextmanager
def _etcd() -> Iterator[Address]:
    program = _program("etcd")

    def configure(folder: Path, port: int) -> tuple[Address, list[str]]:
        clients, peers = f"http://{HOST}:{port}", f"http://{HOST}:{free_port()}"
        return Address(HOST, port), [
            program,
            *("--data-dir", str(folder / "data"), "--name", "only"),
            *("--listen-client-urls", clients, "--advertise-client-urls", clients),
            *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
            *("--initial-cluster", f"only={peers}"),
        ]

    def answers(address: Address) -> bool:
        return b"true" in (_get(f"http://{address.host}:{address.port}/health") or b"")

    with _running(configure, answers) as address:
        yield address


def _configure(programs: Programs, member: Member, etcd: Address, recovery: dict[str, str]) -> Path:
    """Write the configuration, as JSON, which is YAML too."""
    kept = {name: SETTINGS[name] for name in ("fsync", "shared_buffers", "unix_socket_directories")}
    bootstrap = {
        "dcs": {
            **DYNAMIC,
            "postgresql": {"use_pg_rewind": True, "parameters": kept, "recovery_conf": recovery},
        },
        "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "no-sync"],
    }
    postgresql = {
        "listen": f"{HOST}:{member.port}",
        "connect_address": f"{HOST}:{member.port}",
        "data_dir": str(member.folder / "data"),
        "bin_dir": str(programs.folder),
        "pgpass": str(member.folder / "pgpass"),
        "pg_hba": TRUSTED,
        "authentication": {
            "superuser": {"username": SUPERUSER},
            "replication": {"username": "replicator"},
        },
    }
    rest = f"{HOST}:{member.rest}"
    configuration = {
        "scope": "site",
        "name": member.name,
        "restapi": {"listen": rest, "connect_address": rest},
        "etcd3": {"host": f"{etcd.host}:{etcd.port}"},
        "bootstrap": bootstrap,
        "postgresql": postgresql,
    }
    path = member.folder / "patroni.json"
    path.write_text(json.dumps(configuration))
    programs.own(path)
    return path


def _as_account(programs: Programs) -> list[str]:
    """Return the command of this Python as the account, which may not enter root's home."""
    account = programs.account
    if account is None:
        return [sys.executable]
    user = (f"--reuid={account.uid}", f"--regid={account.gid}", "--clear-groups")
    capabilities = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    return [_program("setpriv"), *user, *capabilities, sys.executable]


@contextmanager
def _stopped_at_the_end(programs: Programs, members: list[Member], log: Path) -> Iterator[None]:
    """Stop the servers after their Patronis, also if this process is killed."""
    locks = [str(member.lock) for member in members]
    with log.open("wb") as output:
        command = ("/bin/sh", "-c", WATCH, "watch", *locks)
        watcher = programs.spawn(*command, output=output, stdin=subprocess.PIPE)
    try:
        yield
    finally:
        watcher.communicate()
        running = [pid for each in members if (pid := _first_number(each.lock)) is not None]
        eventually(lambda: not any(map(_exists, running)), 20)
        for pid in filter(_exists, running):
            os.kill(pid, signal.SIGKILL)


def _get(url: str) -> bytes | None:
    """Return the body of a successful response, None for any other."""
    # Errors of HTTP are errors of the system to urllib.
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
        return bytes(response.read())
    return None


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
