"""A PostgreSQL primary and its streaming replicas on this machine, as a context manager:

    with Cluster(Path("data")) as cluster:
        cluster.nodes["replica1"].pause()
        cluster.nodes["primary"].execute("CREATE TABLE t ()")

The sample site, the tests and the benchmarks use it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final, Self

from .node import HOST, SUPERUSER, Node
from .programs import ClusterError, Process, Programs, server_account
from .wal import INSERTED, REPLAYED, end_of_log

__all__ = ["Cluster", "ClusterError", "Node"]

STREAMING: Final = "SELECT count(*) FROM pg_stat_replication WHERE application_name = %s"

# Ends the servers if this process is killed without clean-up: its standard input closes then.
WATCH: Final = """
read -r _
for lock in "$@"; do
    [ -f "$lock" ] && read -r pid < "$lock" && kill -INT "$pid" || continue
    # It may be frozen.
    kill -CONT "$pid" $(cat "/proc/$pid/task/$pid/children" 2>/dev/null)
done
"""


class Cluster:
    """A primary and `replicas` streaming replicas, whose data is kept in `folder` between runs.

    As root, the servers run as another user. If that user cannot access `folder`, a folder
    in the system's temporary folder is used: `self.folder` is the one in use. `keep=False`
    removes the data at the end. `settings` are added to the configuration of all servers.
    `installation` is the folder of another PostgreSQL than the wheel's. `first_port` is the
    primary's, and the replicas have those after it; by default, free ports are selected.
    """

    def __init__(
        self,
        folder: Path,
        replicas: int = 2,
        progress: Callable[[str], None] | None = None,
        settings: Mapping[str, str] | None = None,
        keep: bool = True,
        installation: Path | None = None,
        first_port: int = 0,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self._installation = installation
        self._first_port = first_port
        self.nodes: dict[str, Node] = {}
        self._replicas = replicas
        self._report_progress = progress or _ignore_message
        self._settings = settings or {}
        self._lock: IO[str] | None = None
        self._watcher: Process | None = None
        self._owner = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def primary(self) -> Node:
        """The server that was created as the primary."""
        return self.nodes["primary"]

    @property
    def replicas(self) -> list[Node]:
        """The servers that were created as replicas."""
        return [node for name, node in self.nodes.items() if name != "primary"]

    def start(self) -> None:
        """Create missing servers and start all; after an error, stop those that run."""
        self._owner = os.getpid()
        atexit.register(self.stop)
        try:
            self._prepare()
            self._start_primary()
            with ThreadPoolExecutor() as pool:
                list(pool.map(self._start_replica, self.replicas))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all running servers. Idempotent."""
        if self._owner != os.getpid():
            return  # a forked child, at its exit: the servers belong to its parent
        atexit.unregister(self.stop)
        for node in self.nodes.values():
            node.ask_to_stop()
        for node in self.nodes.values():
            node.wait_stopped(timeout=5)
        self._stop_watcher()
        if not self.keep and self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def database(self, alias_node: str, name: str) -> dict[str, Any]:
        """Return an entry of Django's DATABASES for a database on a server."""
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": name,
            "USER": SUPERUSER,
            "PASSWORD": "",
            "HOST": HOST,
            "PORT": str(self.nodes[alias_node].port),
            "CONN_MAX_AGE": 0,
        }

    def url(self, alias_node: str, name: str) -> str:
        """Return the URL of a database on a server."""
        return f"postgresql://{SUPERUSER}@{HOST}:{self.nodes[alias_node].port}/{name}"

    def create_database(self, name: str) -> bool:
        """Create a database on the primary if missing; return whether it was created."""
        if self.primary.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)):
            return False
        self.primary.execute(f'CREATE DATABASE "{name}"')
        return True

    def wait_caught_up(self, timeout: float = 10) -> None:
        """Wait until every replica has caught up with the primary."""
        target = end_of_log(self.primary.execute(INSERTED)[0][0])
        deadline = time.monotonic() + timeout
        for node in self.replicas:
            while node.execute(REPLAYED)[0][0] < target:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{node.name} has not caught up after {timeout} s")
                time.sleep(0.005)

    # Parts

    def _prepare(self) -> None:
        programs = Programs(server_account(), self._installation)
        programs.make_reachable()
        self.folder = programs.place(self.folder)
        self._lock = _locked(self.folder / "lock")
        primary = Node("primary", self.folder / "primary", programs, self._settings)
        self.nodes = {"primary": primary}
        for number in range(1, self._replicas + 1):
            name = f"replica{number}"
            self.nodes[name] = Node(name, self.folder / name, programs, self._settings, primary)
        for offset, node in enumerate(self.nodes.values()):
            node.port = self._first_port and self._first_port + offset
            node.stop_left_over()
            node.log.unlink(missing_ok=True)
        self._watcher = self._watch(programs)

    def _start_primary(self) -> None:
        primary = self.primary
        if not primary.made:
            self._report_progress("Making the primary …")
            primary.make()
            # Copies of another primary cannot replicate from this one.
            for node in self.replicas:
                shutil.rmtree(node.folder, ignore_errors=True)
        primary.forget_tuning()
        primary.start()
        self._report_progress(f"The primary listens on port {primary.port}.")

    def _start_replica(self, node: Node) -> None:
        fresh = not node.made
        if fresh:
            self._report_progress(f"Copying it to {node.name} …")
            node.make()
        node.forget_tuning()
        node.start()
        if not self._is_streaming(node) and not fresh:
            self._report_progress(f"{node.name} has fallen too far behind; copying it anew …")
            node.stop("immediate")
            node.make()
            node.start()
        self._report_progress(f"{node.name} listens on port {node.port} and follows the primary.")

    def _is_streaming(self, node: Node, timeout: float = 10) -> bool:
        deadline = time.monotonic() + timeout
        while not self.primary.execute(STREAMING, (node.name,))[0][0]:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _watch(self, programs: Programs) -> Process:
        locks = [str(node.folder / "postmaster.pid") for node in self.nodes.values()]
        with (self.folder / "watch.log").open("wb") as log:
            command = ("/bin/sh", "-c", WATCH, "watch", *locks)
            return programs.spawn(*command, output=log, stdin=subprocess.PIPE)

    def _stop_watcher(self) -> None:
        if self._watcher is not None and self._watcher.stdin is not None:
            self._watcher.stdin.close()
            self._watcher.wait()
            self._watcher = None


def _locked(path: Path) -> IO[str]:
    """Lock the folder; the system releases the lock when the process ends."""
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(path.open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(
                f"another run is using {path.parent}; stop it, or choose another folder "
                "(the demo's by SAMPLE_DATA=…)"
            ) from None
        stack.pop_all()
        return lock


def _ignore_message(message: str) -> None:
    pass
