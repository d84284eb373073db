"""A MariaDB primary and two replicas by GTID, started from the system's packages."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pinning_middleware.servers.dialects.mysql import parse_mariadb

from .layouts.waiting import eventually, missing

PROGRAMS = ("mariadbd", "mariadb-install-db")
ACCOUNT = "mysql"
USER, PASSWORD, DATABASE = "site", "site", "site"
NODES = {"my": 1, "my1": 2, "my2": 3}


def find_programs() -> dict[str, str]:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin"])
    found = {name: shutil.which(name, path=path) for name in PROGRAMS}
    if lacking := [name for name, place in found.items() if place is None]:
        missing(f"MariaDB is missing ({', '.join(lacking)}): apt-get install mariadb-server")
    require_driver()
    return {name: place for name, place in found.items() if place is not None}


def require_driver() -> None:
    if importlib.util.find_spec("MySQLdb") is None:
        missing("The driver is missing: pip install mysqlclient")


def as_account() -> dict[str, Any]:
    """Arguments of subprocess: as root the servers run as another user."""
    if os.geteuid() != 0:
        return {}
    account = pwd.getpwnam(ACCOUNT)
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


# Ends the server when this process is killed: its standard input closes then.
WATCH = 'read -r _; kill -KILL "$1"'


class Server:
    """One server with its data."""

    REPLICA: ClassVar[str] = "SLAVE"
    READ_ONLY: ClassVar[str] = "read_only"
    POSITION: ClassVar[str] = "SELECT @@gtid_binlog_pos"
    WAIT: ClassVar[str] = "SELECT MASTER_GTID_WAIT('{}', 30)"
    RESET: ClassVar[str] = "RESET MASTER"

    def __init__(self, alias: str, folder: Path, program: str) -> None:
        self.alias, self.folder, self.number = alias, folder, NODES[alias]
        self.socket = folder / "socket"
        self.log = folder / "log"
        self.port = free_port()
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        if self.running:
            return
        options = self.options()
        command = [self._program, "--no-defaults", *(f"--{k}={v}" for k, v in options.items())]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, **as_account()
            )
        watch = ["/bin/sh", "-c", WATCH, "watch", str(self._process.pid)]
        self._watcher = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
        assert eventually(lambda: not self.running or self.answers(), 60)
        assert self.running, self.log.read_text()[-3000:]

    def options(self) -> dict[str, Any]:
        return {
            "datadir": self.folder / "data",
            "socket": self.socket,
            "port": self.port,
            "pid-file": self.folder / "pid",
            "bind-address": "127.0.0.1",
            "server-id": self.number,
            "log-bin": "binlog",
            "log-slave-updates": 1,
            "binlog-format": "ROW",
            "read-only": int(self.number != 1),
            "skip-name-resolve": 1,
            "innodb-buffer-pool-size": "16M",
            "innodb-log-file-size": "8M",
            "innodb-flush-log-at-trx-commit": 2,
            "performance-schema": 0,
            "slave-net-timeout": 2,
        }

    def stop(self, number: int = signal.SIGKILL) -> None:
        """Stop the server, by default like a crash."""
        if self._watcher is not None:
            # Before the process ID may be reused.
            self._watcher.kill()
            self._watcher.communicate()
            self._watcher = None
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the process, so that it accepts connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            # Its threads stop one after the other.
            tasks = Path(f"/proc/{self._process.pid}/task")
            states = [task / "stat" for task in tasks.iterdir()]
            assert eventually(
                lambda: all(") T " in state.read_text() for state in states if state.exists())
            )
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def answers(self) -> bool:
        import MySQLdb

        try:
            self.execute("SELECT 1")
        except MySQLdb.OperationalError:
            return False
        return True

    def execute(self, sql: str, database: str = "") -> list[tuple[Any, ...]]:
        """Run a statement as root, in autocommit, and return its rows, if any."""
        import MySQLdb

        connection = MySQLdb.connect(
            unix_socket=str(self.socket), user="root", database=database, autocommit=True
        )
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())

    @property
    def position(self) -> str:
        return str(self.execute(self.POSITION)[0][0]).replace("\n", "")

    @property
    def written(self) -> dict[str, int]:
        """The last transaction of each log that this server has written."""
        own = f"-{self.number}"
        return {log: n for log, n in parse_mariadb(self.position).items() if log.endswith(own)}

    def wait_for(self, position: str) -> None:
        """Wait until a replica has replayed a position."""
        waited = self.execute(self.WAIT.format(position))
        assert waited == [(0,)], self.log.read_text()[-2000:]

    def follow(self, other: Server, **options: str) -> None:
        """Replicate another server from now on."""
        more = "".join(f", {key} = {value}" for key, value in options.items())
        self.execute("STOP SLAVE")
        self.execute(
            f"CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = {other.port}, "
            "MASTER_USER = 'replica', MASTER_PASSWORD = 'replica', MASTER_CONNECT_RETRY = 1, "
            f"MASTER_USE_GTID = slave_pos{more}"
        )
        self.execute("START SLAVE")

    def promote(self) -> None:
        self.execute(f"STOP {self.REPLICA}")
        self.execute(f"RESET {self.REPLICA} ALL")
        self.execute("SET GLOBAL read_only = 0")

    def demote(self, primary: Server) -> None:
        self.execute(f"SET GLOBAL {self.READ_ONLY} = 1")
        self.follow(primary)

    def reset_log(self) -> None:
        """Begin the numbers anew, under the same name."""
        self.execute(self.RESET)
        if self.number != 1:
            self.execute("SET GLOBAL gtid_slave_pos = ''")


class Servers:
    """The three servers; `servers["my1"]` is one of them."""

    SERVER: ClassVar[type[Server]] = Server
    PREFIX: ClassVar[str] = "mariadb-"
    MONITOR: ClassVar[str] = "SLAVE MONITOR"
    HAS_ROLE: ClassVar[bool] = False
    REPLAY_ADMIN: ClassVar[str] = "REPLICATION SLAVE ADMIN"
    STATEMENT_TIMEOUT: ClassVar[str] = "max_statement_time = 0.02"
    # To select a domain, and to read the lag of a replica.
    PRIVILEGES: ClassVar[str] = "BINLOG REPLAY, SLAVE MONITOR"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.nodes: dict[str, Server] = {}

    def __getitem__(self, alias: str) -> Server:
        return self.nodes[alias]

    def start(self) -> None:
        program, template = self.install()
        for alias in NODES:
            folder = self._folder / alias
            subprocess.run(["mkdir", folder], check=True, **as_account())
            subprocess.run(["cp", "-r", template, folder / "data"], check=True, **as_account())
            self.nodes[alias] = self.SERVER(alias, folder, program)
            self.nodes[alias].start()
        self.replicate()
        primary = self.nodes["my"]
        for sql in (
            f"CREATE DATABASE {DATABASE} CHARACTER SET utf8mb4",
            f"CREATE USER {USER} IDENTIFIED BY '{PASSWORD}'",
            f"GRANT ALL ON {DATABASE}.* TO {USER}",
            f"GRANT {self.PRIVILEGES} ON *.* TO {USER}",
        ):
            primary.execute(sql)
        self.wait_for()

    def replicate(self) -> None:
        """Begin to replicate the primary, which is empty."""
        primary = self.nodes["my"]
        primary.execute("CREATE USER replica IDENTIFIED BY 'replica'")
        primary.execute("GRANT REPLICATION SLAVE ON *.* TO replica")
        for alias in ("my1", "my2"):
            self.nodes[alias].follow(primary)

    @staticmethod
    def find_program() -> str:
        """Return the server's program. Skip the test if there is none."""
        return find_programs()["mariadbd"]

    def install(self) -> tuple[str, Path]:
        """Return the server's program, and a data folder that it can start with."""
        return self.find_program(), self.make_data(
            find_programs()["mariadb-install-db"],
            *("--auth-root-authentication-method=normal", "--skip-test-db"),
        )

    def make_data(self, program: str, *options: str) -> Path:
        """Make a data folder. On a busy machine the server that fills it does not always start."""
        for number in range(3):
            template = self._folder / f"template{number}"
            made = subprocess.run(
                [program, "--no-defaults", f"--datadir={template}", *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd="/",
                **as_account(),
            )
            if not made.returncode:
                return template
        raise AssertionError(made.stdout)

    def stop(self) -> None:
        for server in self.nodes.values():
            server.stop()

    def entries(self) -> dict[str, dict[str, Any]]:
        return {
            alias: {
                "ENGINE": "django.db.backends.mysql",
                "NAME": DATABASE,
                "USER": USER,
                "PASSWORD": PASSWORD,
                "HOST": "127.0.0.1",
                "PORT": str(server.port),
                "CONN_MAX_AGE": None,
                "OPTIONS": {},
            }
            for alias, server in self.nodes.items()
        }

    # Faults

    def pause(self, *aliases: str) -> None:
        for alias in aliases or ("my1", "my2"):
            self[alias].execute(f"STOP {self[alias].REPLICA} SQL_THREAD")

    def resume(self, *aliases: str) -> None:
        """Resume replay, and wait until the replicas have caught up."""
        for alias in aliases or ("my1", "my2"):
            self[alias].execute(f"START {self[alias].REPLICA}")
        self.wait_for(*aliases)

    def wait_for(self, *aliases: str) -> None:
        position = self["my"].position
        for alias in aliases or ("my1", "my2"):
            self[alias].wait_for(position)

    def terminate(self, alias: str) -> None:
        """Kill all connections of the site to a server."""
        own = f"FROM information_schema.processlist WHERE user = '{USER}'"
        for (number,) in self[alias].execute(f"SELECT id {own}"):
            self[alias].execute(f"KILL {number}")
        assert eventually(lambda: self[alias].execute(f"SELECT count(*) {own}") == [(0,)])

    def repair(self) -> None:
        for server in self.nodes.values():
            server.start()
        for alias in ("my1", "my2"):
            self[alias].execute(f"START {self[alias].REPLICA}")
        self.wait_for()


@contextlib.contextmanager
def running_servers(kind: type[Servers] = Servers) -> Iterator[Servers]:
    """Run three servers, and stop them at the end, also after an error."""
    kind.find_program()
    # A short path, for the sockets; open to the servers' account, as pytest's own are not.
    folder = Path(tempfile.mkdtemp(prefix=kind.PREFIX))
    servers = kind(folder)
    atexit.register(servers.stop)
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, ACCOUNT)
        servers.start()
        yield servers
    finally:
        servers.stop()
        atexit.unregister(servers.stop)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
