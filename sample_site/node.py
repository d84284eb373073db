"""One PostgreSQL server: start, stop, lag, promote, follow another primary."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import psycopg

from .programs import ClusterError, Process, Programs, uninterrupted

HOST: Final = "127.0.0.1"
SUPERUSER: Final = "postgres"
STOP_SIGNALS: Final = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
# Below the range of ports for outgoing connections, so that a server that is
# stopped finds its port free when it is restarted.
PORTS: Final = range(15000, 30000)
START_ATTEMPTS: Final = 20
PORT_TAKEN: Final = ("could not bind", "could not create any TCP/IP sockets")
# The child processes of a killed server need a moment to exit.
STILL_LEAVING: Final = ("pre-existing shared memory block",)

BUILTIN_LOCALE: Final = ("--locale-provider", "builtin", "--builtin-locale", "C.UTF-8")

# Speed over durability, for a demonstration. Full pages are still written: without
# them a killed replica may find "invalid pages" when it replays its log again.
SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "fsync": "off",
    "shared_buffers": "32MB",
    "max_connections": "200",
    "wal_level": "replica",
    "hot_standby": "on",
    "max_wal_senders": "20",
    "wal_keep_size": "256MB",
    "min_wal_size": "32MB",
    "wal_receiver_status_interval": "1s",
    "wal_retrieve_retry_interval": "100ms",
    "logging_collector": "off",
    "log_line_prefix": "%m [%p] ",
}


class Node:
    """A server with a data folder. `upstream` is the server it replicates, or None for a primary.

    The port is selected at the first start and kept for the lifetime of the object.
    """

    host = HOST

    def __init__(
        self,
        name: str,
        folder: Path,
        programs: Programs,
        settings: Mapping[str, str],
        upstream: Node | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.log = folder.with_suffix(".log")
        self.port = 0
        self._programs = programs
        self._settings = {**SETTINGS, **settings}
        self._upstream = upstream
        self._process: Process | None = None
        self._frozen: list[int] = []

    def __repr__(self) -> str:
        return f"<Node {self.name} on {self.host}:{self.port}>"

    # Making

    @property
    def made(self) -> bool:
        """Whether the folder contains a complete server of the right kind."""
        return (self.folder / "PG_VERSION").exists() and self._is_standby == bool(self._upstream)

    def make(self) -> None:
        """Create the data folder: an empty server, or a copy of the (running) upstream."""
        making = self.folder.with_suffix(".making")
        for folder in (making, self.folder):
            shutil.rmtree(folder, ignore_errors=True)
        if self._upstream is None:
            self._programs.run(
                "initdb",
                *("--pgdata", str(making), "--username", SUPERUSER, "--auth", "trust"),
                *("--encoding", "UTF8", "--locale", "C", "--no-sync", "--no-instructions"),
                *(BUILTIN_LOCALE if self._programs.major >= 17 else ()),
            )
        else:
            self._programs.run(
                "pg_basebackup",
                *("--pgdata", str(making), "--dbname", self._upstream.conninfo()),
                *("--checkpoint", "fast", "--wal-method", "stream", "--no-sync"),
            )
            (making / "standby.signal").touch()
            self._programs.own(making / "standby.signal")
        # Rename the folder only when it is complete.
        making.rename(self.folder)

    def forget_tuning(self) -> None:
        """Remove settings of ALTER SYSTEM, for example the delay of an earlier run."""
        (self.folder / "postgresql.auto.conf").write_text("")

    # Running

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process ID of the server while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    def start(self, timeout: float = 30) -> None:
        """Start the server and wait until it accepts queries."""
        if self.running:
            return
        for _ in range(START_ATTEMPTS):
            port = self.port or _free_port()
            self._write_settings(port)
            complaint = self._launch(timeout)
            if complaint is None:
                self.port = port
                return
            if not any(words in complaint for words in (*PORT_TAKEN, *STILL_LEAVING)):
                break
            time.sleep(0.1)
        raise ClusterError(f"{self.name} did not start:\n{complaint}")

    def stop(self, mode: str = "fast", timeout: float = 15) -> None:
        """Stop the server: `smart`, `fast`, or `immediate` for a crash."""
        self.ask_to_stop(mode)
        self.wait_stopped(timeout)

    def ask_to_stop(self, mode: str = "fast") -> None:
        """Send the signal without waiting."""
        if self._process is not None and self.running:
            self._process.send_signal(STOP_SIGNALS[mode])
            # A process suspended by SIGSTOP handles no other signal before SIGCONT.
            self.thaw()
            self._process.send_signal(signal.SIGCONT)

    def wait_stopped(self, timeout: float = 15) -> None:
        """Wait for the end, and kill the process after a timeout."""
        if self._process is None:
            return
        for number in (signal.SIGQUIT, signal.SIGKILL):
            try:
                self._process.wait(timeout)
                break
            except subprocess.TimeoutExpired:
                self._process.send_signal(number)
                timeout = 5
        self._process.wait()
        self._process = None

    def restart(self, mode: str = "fast") -> None:
        """Stop and start the server, on the same port."""
        self.stop(mode)
        self.start()

    def stop_left_over(self) -> None:
        """Stop the server of an earlier run that was killed, and remove its lock file."""
        lock = self.folder / "postmaster.pid"
        pid = _first_number(lock)
        if pid is not None and _is_server_of(pid, self.folder):
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                _kill(pid, number)
                for one in (*_descendants(pid), pid):
                    _kill(one, signal.SIGCONT)
                if _becomes_true(lambda: not _is_server_of(pid, self.folder), 5):
                    break
        lock.unlink(missing_ok=True)

    # Freezing

    def freeze(self, timeout: float = 10) -> None:
        """Suspend its processes: the system accepts connections, but none gets a reply."""
        postmaster = self.pid
        if postmaster is None:
            raise ClusterError(f"{self.name} does not run")
        # The parent process first. While it is frozen, the ID of a child process
        # is not reused.
        fresh = [postmaster]
        while fresh:
            for one in fresh:
                self._frozen.append(one)
                _kill(one, signal.SIGSTOP)
            if not _becomes_true(lambda: _have_stopped(self._frozen), timeout):
                self.thaw()
                raise TimeoutError(f"{self.name} did not freeze within {timeout} s")
            fresh = [one for one in _descendants(postmaster) if one not in self._frozen]

    def thaw(self) -> None:
        """Resume its processes if they are frozen."""
        while self._frozen:
            _kill(self._frozen[-1], signal.SIGCONT)
            self._frozen.pop()

    # Queries

    def conninfo(self, database: str = "postgres", **more: str) -> str:
        """Return a libpq connection string."""
        parts = {"host": HOST, "port": str(self.port), "user": SUPERUSER, "dbname": database}
        return psycopg.conninfo.make_conninfo(**parts | {"connect_timeout": "5"} | more)

    def execute(
        self, sql: str, params: tuple[object, ...] | None = None, database: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """Run a statement as superuser, in autocommit, and return its rows, if any."""
        with psycopg.connect(self.conninfo(database), autocommit=True) as connection:
            cursor = connection.execute(sql, params)
            return cursor.fetchall() if cursor.description else []

    # Replication

    @property
    def in_recovery(self) -> bool:
        """Whether the server is currently a replica."""
        return bool(self.execute("SELECT pg_is_in_recovery()")[0][0])

    def pause(self, timeout: float = 15) -> None:
        """Pause replay, and wait until it is paused."""
        self.execute("SELECT pg_wal_replay_pause()")
        if not _becomes_true(lambda: self._pause_state() == "paused", timeout):
            raise TimeoutError(f"{self.name} did not pause within {timeout} s")

    def resume(self) -> None:
        """Resume replay."""
        self.execute("SELECT pg_wal_replay_resume()")

    def set_delay(self, seconds: float) -> None:
        """Delay the replay of commits (seconds)."""
        milliseconds = round(seconds * 1000)
        self.execute(f"ALTER SYSTEM SET recovery_min_apply_delay = '{milliseconds}ms'")
        self.execute("SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Promote this replica, and wait until it is a primary."""
        self.execute("SELECT pg_promote(true, 30)")
        self._upstream = None

    def repoint(self, other: Node) -> None:
        """Follow another server without a restart; for a running replica."""
        self._upstream = other
        self._write_settings(self.port)
        self.execute("SELECT pg_reload_conf()")

    def follow(self, other: Node) -> None:
        """Follow another server; a running server is restarted."""
        self._upstream = other
        was_running = self.running
        self.stop()
        (self.folder / "standby.signal").touch()
        self._programs.own(self.folder / "standby.signal")
        if was_running:
            self.start()

    # Parts

    @property
    def _is_standby(self) -> bool:
        return (self.folder / "standby.signal").exists()

    def _pause_state(self) -> object:
        return self.execute("SELECT pg_get_wal_replay_pause_state()")[0][0]

    def _write_settings(self, port: int) -> None:
        settings = self._settings | {"port": str(port)}
        if self._upstream is not None:
            settings["primary_conninfo"] = self._upstream.conninfo(application_name=self.name)
        lines = [f"{key} = '{_quoted(value)}'\n" for key, value in settings.items()]
        # In place, to keep the owner and mode that initdb has set.
        (self.folder / "postgresql.conf").write_text("".join(lines))

    def _launch(self, timeout: float) -> str | None:
        """Start the process; return None when it is ready, else its output."""
        with self.log.open("ab") as log:
            before = log.tell()
            with uninterrupted():
                self._process = self._programs.spawn("postgres", "-D", str(self.folder), output=log)
        if not _becomes_true(lambda: not self.running or self._is_ready(), timeout):
            self.stop("immediate")
            return f"not ready after {timeout} s\n{self._log_since(before)}"
        if self.running:
            return None
        self.wait_stopped()
        return self._log_since(before)

    def _is_ready(self) -> bool:
        """Read the state from the server's lock file, as pg_ctl does."""
        try:
            lines = (self.folder / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _log_since(self, position: int) -> str:
        with self.log.open("rb") as log:
            log.seek(position)
            return log.read().decode(errors="replace").strip()


def _quoted(value: str) -> str:
    return value.replace("'", "''")


def _free_port() -> int:
    """Return a free port. It may be taken before its use: the caller tries again."""
    for port in random.sample(PORTS, 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise ClusterError("no free port was found")


def _first_number(path: Path) -> int | None:
    try:
        return int(path.read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return None


def _is_server_of(pid: int, folder: Path) -> bool:
    """Whether the process is a server of this folder, since IDs are reused."""
    if Path("/proc/self").exists():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return False
    else:
        ps = ["ps", "-o", "command=", "-p", str(pid)]
        command = subprocess.run(ps, capture_output=True, text=True).stdout
    return str(folder) in command


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _processes() -> dict[int, tuple[int, str]]:
    """Return the parent and the state of every process."""
    if not Path("/proc/self").exists():
        ps = ["ps", "-A", "-o", "pid=,ppid=,state="]
        rows = map(
            str.split, subprocess.run(ps, capture_output=True, text=True).stdout.splitlines()
        )
        return {int(pid): (int(parent), state[0]) for pid, parent, state in rows}
    found = {}
    # Not with `glob`, which fails if a process ends meanwhile.
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            # After the name, which may contain any character.
            state, parent = stat.rpartition(")")[2].split()[:2]
            found[int(pid)] = int(parent), state
    return found


def _descendants(pid: int) -> list[int]:
    processes = _processes()
    found = [pid]
    for parent in found:
        found += [child for child, (its, _) in processes.items() if its == parent]
    return found[1:]


def _have_stopped(pids: list[int]) -> bool:
    processes = _processes()
    return all(processes[pid][1] in "TZ" for pid in pids if pid in processes)


def _becomes_true(condition: Callable[[], bool], timeout: float) -> bool:
    return any(condition() for _ in _ticks(timeout))


def _ticks(timeout: float, pause: float = 0.01) -> Iterator[None]:
    """Yield until the deadline, for polling."""
    deadline = time.monotonic() + timeout
    yield
    while time.monotonic() < deadline:
        time.sleep(pause)
        yield
