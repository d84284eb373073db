"""The servers of a run, by layout: databases, what stands in front of them, the cache, the site."""

from __future__ import annotations

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

from redis import Redis

from sample_site.cluster import Cluster
from tests.real import mariadb, mysql
from tests.real.layouts import Bouncer, Place, chosen, database, haproxy, make_role, pgbouncer
from tests.real.sample import ROOT, eventually, free_port, is_listening
from tests.valkey import running as running_valkey

__all__ = ["LAYOUTS", "SERVERS", "Rig", "running"]

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
    """What a fault can act on: ``servers`` are those of PostgreSQL, or of MariaDB or MySQL."""

    settings: dict[str, Any]
    servers: Cluster | mariadb.Servers


Layout = Callable[[ExitStack, Path, dict[str, Any]], Rig]


def _cluster(stack: ExitStack, folder: Path) -> Cluster:
    cluster = stack.enter_context(Cluster(folder / "cluster", keep=False, installation=chosen()))
    cluster.create_database("site")
    make_role(cluster, monitor=True)
    return cluster


def _on_postgresql(
    arrange: Callable[[ExitStack, Cluster], Mapping[str, tuple[Place, ...]]], **more: Any
) -> Layout:
    def layout(stack: ExitStack, folder: Path, options: dict[str, Any]) -> Rig:
        cluster = _cluster(stack, folder)
        places = arrange(stack, cluster)
        given = {"user": "site_monitor", **more, **options}
        databases = {alias: database(*them, **given) for alias, them in places.items()}
        replicas = [alias for alias in databases if alias != "default"]
        return Rig({"DATABASES": databases, "PINNING_REPLICAS": replicas}, cluster)

    return layout


def _one_alias_per_server(stack: ExitStack, cluster: Cluster) -> dict[str, tuple[Place, ...]]:
    replicas = {node.name: (node,) for node in cluster.replicas}
    return {"default": (cluster.primary,), **replicas}


def _list_of_hosts(stack: ExitStack, cluster: Cluster) -> dict[str, tuple[Place, ...]]:
    return {"default": (cluster.primary,), "replicas": tuple(cluster.replicas)}


def _haproxy(stack: ExitStack, cluster: Cluster) -> dict[str, tuple[Place, ...]]:
    proxy = stack.enter_context(haproxy(*cluster.replicas))
    return {"default": (cluster.primary,), "replicas": (proxy,)}


def _pgbouncer(mode: str) -> Callable[[ExitStack, Cluster], dict[str, tuple[Place, ...]]]:
    def arrange(stack: ExitStack, cluster: Cluster) -> dict[str, tuple[Place, ...]]:
        def bounced(place: Place) -> tuple[Bouncer]:
            # Of a session pool each connection of the site takes one, for as long as it is open.
            settings = {"default_pool_size": f"{2 * THREADS + 16}"}
            return (stack.enter_context(pgbouncer(place, pool_mode=mode, **settings)),)

        replicas = {node.name: bounced(node) for node in cluster.replicas}
        return {"default": bounced(cluster.primary), **replicas}

    return arrange


def _with_gtids(kind: type[mariadb.Servers]) -> Layout:
    def layout(stack: ExitStack, folder: Path, options: dict[str, Any]) -> Rig:
        servers = stack.enter_context(mariadb.running_servers(kind))
        age = options.get("conn_max_age", 0)
        entries = {
            "default" if alias == "my" else alias: {**entry, "CONN_MAX_AGE": age}
            for alias, entry in servers.entries().items()
        }
        return Rig({"DATABASES": entries, "PINNING_REPLICAS": ["my1", "my2"]}, servers)

    return layout


LAYOUTS: Final[Mapping[str, Layout]] = {
    "aliases": _on_postgresql(_one_alias_per_server),
    "hosts": _on_postgresql(_list_of_hosts),
    "haproxy": _on_postgresql(_haproxy),
    "pgbouncer-session": _on_postgresql(_pgbouncer("session")),
    "pgbouncer-transaction": _on_postgresql(
        _pgbouncer("transaction"), DISABLE_SERVER_SIDE_CURSORS=True
    ),
    "pool-pgbouncer": _on_postgresql(
        _pgbouncer("session"), pool={"min_size": 0, "max_size": THREADS}
    ),
    "pool": _on_postgresql(_one_alias_per_server, pool={"min_size": 0, "max_size": THREADS}),
    "mariadb": _with_gtids(mariadb.Servers),
    "mysql": _with_gtids(mysql.Servers),
}


class Running(NamedTuple):
    """A site that is served, and the processes of its cache and of its server."""

    rig: Rig
    port: int
    cache: int
    server: int


@contextmanager
def running(
    layout: str,
    server: str,
    folder: Path,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    longest: float = 1.0,
) -> Iterator[Running]:
    """
    Run everything, and stop it at the end, also after an error. The site is warm when no read
    takes longer than `longest` (seconds).
    """
    with ExitStack() as stack:
        rig = LAYOUTS[layout](stack, folder, dict(options))
        valkey = stack.enter_context(running_valkey())
        cache = {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": valkey.connection_url,
        }
        chosen = {**rig.settings, "CACHES": {"default": cache}, **settings}
        environ = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.soak.settings",
            "SOAK_SETTINGS": json.dumps(chosen),
        }
        migrate = [sys.executable, "-m", "django", "migrate", "--run-syncdb", "--verbosity=0"]
        subprocess.run(migrate, cwd=ROOT, env=environ, check=True)
        port, parent = stack.enter_context(_served(server, environ, folder / "site.log", longest))
        process = Redis.from_url(valkey.connection_url).info("server")["process_id"]
        yield Running(rig, port, process, parent)


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
