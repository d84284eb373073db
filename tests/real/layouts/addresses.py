"""Addresses that resolve to one or several servers, can be moved, or are unresponsive."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple, Protocol, Self

from sample_site.node import HOST, SUPERUSER

CHUNK: Final = 65536


class Place(Protocol):
    """A host and port: a server, a proxy, or a plain address."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...


class Address(NamedTuple):
    host: str
    port: int


def database(
    *places: Place,
    name: str = "site",
    user: str = SUPERUSER,
    conn_max_age: float | None = 0,
    pool: bool | Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return an entry of DATABASES; several places become libpq's list of hosts, in random order.

    `pool` is that of Django's option (which needs `psycopg_pool` and a `conn_max_age` of 0),
    `more` are keys of the entry.
    """
    chosen = {"load_balance_hosts": "random"} if len(places) > 1 else {}
    pooling = {} if pool is None else {"pool": pool if isinstance(pool, bool) else dict(pool)}
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "USER": user,
        "PASSWORD": "",
        "HOST": ",".join(place.host for place in places),
        "PORT": ",".join(str(place.port) for place in places),
        "CONN_MAX_AGE": conn_max_age,
        "OPTIONS": {**chosen, **pooling, **(options or {})},
        **more,
    }


@contextmanager
def black_hole() -> Iterator[Address]:
    """An address that accepts up to a hundred connections and never responds."""
    with socket.create_server((HOST, 0), backlog=100) as listener:
        yield Address(*listener.getsockname())


class Forwarder:
    """An address that forwards connections to a place, which may be changed later.

    A connection is closed if the place accepts none.
    """

    def __init__(self, place: Place, host: str = HOST, port: int = 0) -> None:
        self._target = (place.host, place.port)
        self._listener = socket.create_server((host, port))
        self.host: str = host
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Forwarder {self.host}:{self.port} to {self._target}>"

    def point_to(self, place: Place, cut: bool = True) -> None:
        """Forward to another place from now on; close older connections if `cut`."""
        with self._lock:
            self._target = (place.host, place.port)
        if cut:
            self.cut()

    def cut(self) -> None:
        """Close all connections."""
        with self._lock:
            for one in self._open:
                # Wakes the reading thread, which closes the socket.
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Accept no more connections and close the existing ones."""
        with self._lock:
            self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._thread.join(5)

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(near,), daemon=True).start()

    def _forward(self, near: socket.socket) -> None:
        with near, suppress(OSError), socket.socket() as far:
            with self._lock:
                if self._closed:
                    return
                target = self._target
                self._open |= {near, far}
            try:
                far.connect(target)
                for one in (near, far):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                back = threading.Thread(target=self._copy, args=(far, near), daemon=True)
                back.start()
                self._copy(near, far)
                back.join()
            finally:
                with self._lock:
                    self._open -= {near, far}

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                sink.sendall(data)
        # The protocol does not use half-closed connections.
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
