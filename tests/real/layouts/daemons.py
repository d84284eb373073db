"""HAProxy, PgBouncer and nginx, from the system's packages, in front of servers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import psycopg

from sample_site.node import HOST, SUPERUSER
from sample_site.node import _free_port as free_port
from sample_site.programs import ClusterError, Process, Programs, server_account, uninterrupted

from .addresses import Address, Forwarder, Place
from .postgres import ROLES
from .waiting import eventually, missing

T = TypeVar("T")

ATTEMPTS: Final = 20

# Ends the program if this process is killed without clean-up: the pipe of its standard input
# closes then.
WATCH: Final = 'read -r _; kill -KILL "$1"; rm -rf "$2"'


# HAProxy


class Proxy:
    """A HAProxy that forwards each connection to one of several servers."""

    def __init__(self, address: Address, control: Path, slots: int) -> None:
        self.host, self.port = address
        self._control = control
        self._slots = [f"front/s{number}" for number in range(slots)]

    def point_to(self, *places: Place, cut: bool = True) -> None:
        """Forward to these places only; close older connections if `cut`."""
        if len(places) > len(self._slots):
            raise ValueError(f"this proxy has {len(self._slots)} slots")
        for slot in self._slots[len(places) :]:
            self._command(f"set server {slot} state maint")
        for slot, place in zip(self._slots, places, strict=False):
            self._command(f"set server {slot} addr {place.host} port {place.port}")
            self._command(f"set server {slot} state ready")
        if cut:
            self.cut()

    def cut(self) -> None:
        """Close all connections."""
        for slot in self._slots:
            self._command(f"shutdown sessions server {slot}")
        assert eventually(lambda: not self.connections)

    @property
    def connections(self) -> int:
        """Return the number of connections to servers."""
        rows = [row.split(",") for row in self._command("show stat -1 4 -1").splitlines()]
        place = rows[0].index("scur")
        return sum(int(row[place]) for row in rows[1:] if row and row[0] == "front")

    @property
    def up(self) -> int:
        """Return the number of servers that it considers up."""
        rows = [row.split(",") for row in self._command("show stat -1 4 -1").splitlines()]
        place = rows[0].index("status")
        return sum(row[place].startswith(("UP", "no check")) for row in rows[1:] if len(row) > 1)

    def answers(self) -> bool:
        with suppress(OSError):
            return "Pid" in self._command("show info")
        return False

    def _command(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(5)
            control.connect(str(self._control))
            control.sendall(f"{command}\n".encode())
            with control.makefile() as answer:
                return answer.read().strip()


HAPROXY: Final = """\
global
    # Two of them must not share a port unasked.
    noreuseport
    stats socket {control} mode 600 level admin
defaults
    mode tcp
    timeout connect 5s
    timeout check 500ms
    timeout client 1h
    timeout server 1h
    retries 3
    option redispatch 1
listen front
    bind {host}:{port}
    balance {balance}
    {check}
    default-server init-addr none {checked}
"""


@contextmanager
def haproxy(
    *places: Place,
    balance: str = "roundrobin",
    check: bool = False,
    rest: tuple[str, Sequence[int]] | None = None,
    slots: int = 4,
) -> Iterator[Proxy]:
    """Run HAProxy in front of these places, with `roundrobin` or `leastconn`.

    With `check` it asks them ten times a second whether they are there, and cuts the connections
    to one that isn't. `rest` is a request that is sent to a port of each place instead, and
    answered by 200 if it is there. At most `slots` places can be pointed to later.
    """
    program = _program("haproxy")
    slots = max(slots, len(places))
    asked = f"option pgsql-check user {SUPERUSER}" if check else ""
    if rest is not None:
        asked = f"option httpchk {rest[0]}\n    http-check expect status 200"

    def configure(folder: Path, port: int) -> tuple[Proxy, list[str]]:
        proxy = Proxy(Address(HOST, port), folder / "control", slots)
        text = HAPROXY.format(
            control=folder / "control",
            host=HOST,
            port=port,
            balance=balance,
            check=asked,
            checked="check inter 100ms fall 2 rise 1 on-marked-down shutdown-sessions"
            if asked
            else "",
        )
        for number in range(slots):
            # A slot without a place has an unused address.
            place = places[number] if number < len(places) else Address(HOST, 1)
            more = "" if number < len(places) else " disabled"
            if rest is not None and number < len(places):
                more = f" port {rest[1][number]}"
            text += f"    server s{number} {place.host}:{place.port}{more}\n"
        (folder / "haproxy.cfg").write_text(text)
        return proxy, [program, "-db", "-f", str(folder / "haproxy.cfg")]

    with _running(configure, Proxy.answers) as proxy:
        yield proxy


# nginx

NGINX: Final = """\
daemon off;
master_process off;
pid {folder}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    fastcgi_temp_path {folder}/fastcgi;
    proxy_temp_path {folder}/proxy;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    proxy_cache_path {folder}/cache keys_zone=pages:1m;
    server {{
        listen {host}:{port};
        location / {{
            proxy_pass {site};
            proxy_cache pages;
            proxy_cache_valid 200 1h;
            {ignored}
        }}
    }}
}}
"""


@contextmanager
def nginx(site: str, *ignored_headers: str) -> Iterator[str]:
    """Run nginx as a shared cache in front of the URL of a site; return its own URL."""
    program = _program("nginx")
    ignored = f"proxy_ignore_headers {' '.join(ignored_headers)};" if ignored_headers else ""

    def configure(folder: Path, port: int) -> tuple[Address, list[str]]:
        configuration = folder / "nginx.conf"
        configuration.write_text(
            NGINX.format(folder=folder, host=HOST, port=port, site=site, ignored=ignored)
        )
        return Address(HOST, port), [program, "-e", "stderr", "-c", str(configuration)]

    def answers(address: Address) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(tuple(address)) == 0

    with _running(configure, answers) as address:
        yield f"http://{address.host}:{address.port}"


# PgBouncer


class Bouncer:
    """A PgBouncer; `forwarders` forward to the servers if there are several."""

    def __init__(self, address: Address, forwarders: Sequence[Forwarder]) -> None:
        self.host, self.port = address
        self.forwarders = list(forwarders)

    def admin(self, command: str) -> list[dict[str, Any]]:
        """Run a command of the admin console: SHOW SERVERS, RECONNECT, PAUSE, …"""
        with psycopg.connect(
            host=self.host,
            port=self.port,
            user=SUPERUSER,
            dbname="pgbouncer",
            autocommit=True,
            connect_timeout=5,
            row_factory=psycopg.rows.dict_row,
        ) as connection:
            cursor = connection.execute(command.encode())
            return cursor.fetchall() if cursor.description else []

    def answers(self) -> bool:
        with suppress(psycopg.OperationalError):
            return bool(self.admin("SHOW VERSION"))
        return False


@contextmanager
def pgbouncer(
    *places: Place,
    pool_mode: str = "transaction",
    dbname: str = "site",
    users: Sequence[str] = (SUPERUSER, *ROLES.values()),
    **settings: str,
) -> Iterator[Bouncer]:
    """Run PgBouncer in front of these places, round robin, for these users, without passwords.

    Its list of hosts has one port for all of them: several places stand on loopback addresses
    of their own then, which only Linux has unasked.
    """
    program = _program("pgbouncer")
    with ExitStack() as stack:
        forwarders: list[Forwarder] = []
        target = Address(places[0].host, places[0].port)
        if len(places) > 1:
            forwarders = stack.enter_context(_on_one_port(places))
            target = Address(",".join(one.host for one in forwarders), forwarders[0].port)
        common = {
            "listen_addr": HOST,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "admin_users": SUPERUSER,
            "pool_mode": pool_mode,
            "ignore_startup_parameters": "extra_float_digits",
            "max_client_conn": "500",
            # The default delay before a reconnect is 15 s.
            "server_login_retry": "0.1",
            **settings,
        }

        def configure(folder: Path, port: int) -> tuple[Bouncer, list[str]]:
            account = folder / "users"
            account.write_text("".join(f'"{user}" ""\n' for user in users))
            options = common | {"listen_port": str(port), "auth_file": str(account)}
            (folder / "pgbouncer.ini").write_text(
                f"[databases]\n{dbname} = host={target.host} port={target.port} dbname={dbname}\n"
                "[pgbouncer]\n" + "".join(f"{key} = {value}\n" for key, value in options.items())
            )
            return Bouncer(Address(HOST, port), forwarders), [
                program,
                str(folder / "pgbouncer.ini"),
            ]

        yield stack.enter_context(_running(configure, Bouncer.answers))


@contextmanager
def _on_one_port(places: Sequence[Place]) -> Iterator[list[Forwarder]]:
    """Run forwarders to these places on 127.0.0.2, .3, …, all on the same port."""
    for attempt in range(ATTEMPTS):
        port = free_port()
        with ExitStack() as stack:
            try:
                made = [
                    stack.enter_context(Forwarder(place, f"127.0.0.{number}", port))
                    for number, place in enumerate(places, 2)
                ]
            except OSError:
                if attempt == ATTEMPTS - 1:
                    raise
                continue
            yield made
            return


# pgpool-II

# https://www.pgpool.net/docs/43/en/html/runtime-config.html
PGPOOL: Final = """\
backend_clustering_mode = 'streaming_replication'
listen_addresses = '{host}'
port = {port}
pcp_port = {pcp_port}
socket_dir = '{folder}'
pcp_socket_dir = '{folder}'
pid_file_name = '{folder}/pid'
logdir = '{folder}'
num_init_children = 16
sr_check_period = 1
search_primary_node_timeout = 1
sr_check_user = '{user}'
load_balance_mode = {load_balance_mode}
"""


class PgPool:
    """A pgpool-II."""

    def __init__(self, address: Address) -> None:
        self.host, self.port = address

    def answers(self) -> bool:
        """Return whether it has looked for a primary among its servers."""
        with (
            suppress(psycopg.OperationalError),
            psycopg.connect(
                host=self.host, port=self.port, user=SUPERUSER, dbname="postgres", connect_timeout=2
            ) as connection,
        ):
            return bool(connection.execute(b"PGPOOL SHOW load_balance_mode").fetchall())
        return False


@contextmanager
def pgpool(*places: Place, load_balance_mode: str = "on", **settings: str) -> Iterator[PgPool]:
    """Run pgpool-II in front of these servers of one cluster, without passwords."""
    program = _program("pgpool")

    def configure(folder: Path, port: int) -> tuple[PgPool, list[str]]:
        text = PGPOOL.format(
            folder=folder,
            host=HOST,
            port=port,
            pcp_port=free_port(),
            user=SUPERUSER,
            load_balance_mode=load_balance_mode,
        )
        for number, place in enumerate(places):
            text += f"backend_hostname{number} = '{place.host}'\n"
            text += f"backend_port{number} = {place.port}\n"
            text += f"backend_weight{number} = 1\n"
        text += "".join(f"{key} = {value}\n" for key, value in settings.items())
        (folder / "pgpool.conf").write_text(text)
        options = ("-n", "-f", str(folder / "pgpool.conf"), "-F", str(folder / "pcp.conf"))
        return PgPool(Address(HOST, port)), [program, *options]

    with _running(configure, PgPool.answers, end=signal.SIGINT) as running:
        yield running


# Parts


def _program(name: str) -> str:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which(name, path=path) or missing(f"{name} is missing: apt-get install {name}")


@contextmanager
def _running(
    configure: Callable[[Path, int], tuple[T, list[str]]],
    answers: Callable[[T], bool],
    end: signal.Signals = signal.SIGKILL,
) -> Iterator[T]:
    """A program on a free port, in a folder of its own, until the block ends or we do."""
    programs = Programs(server_account())
    folder = programs.place(Path(tempfile.mkdtemp(prefix="pinning-")))
    try:
        for _ in range(ATTEMPTS):
            what, command = configure(folder, free_port())
            for path in folder.iterdir():
                programs.own(path)
            with ExitStack() as stack:
                process = stack.enter_context(_spawned(programs, command, folder, end))
                if eventually(partial(_settled, process, answers, what)) and process.poll() is None:
                    yield what
                    return
            complaint = (folder / "log").read_text()
            if "already in use" not in complaint:
                break
        raise ClusterError(f"{command[0]} did not start:\n{complaint}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settled(process: Process, answers: Callable[[T], bool], what: T) -> bool:
    return process.poll() is not None or answers(what)


@contextmanager
def _spawned(
    programs: Programs, command: list[str], folder: Path, end: signal.Signals
) -> Iterator[Process]:
    with ExitStack() as stack:
        with uninterrupted(), (folder / "log").open("wb") as output:
            process = programs.spawn(*command, output=output)
            stack.callback(process.wait)
            stack.callback(process.send_signal, end)
            watch = ["/bin/sh", "-c", WATCH, "watch", str(process.pid), str(folder)]
            watcher = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
            # Before the process ID may be reused.
            stack.callback(watcher.communicate)
            stack.callback(watcher.kill)
        yield process
