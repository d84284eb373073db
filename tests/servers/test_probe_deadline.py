"""The deadline of a probe by a driver whose waits cannot be watched."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from pinning_middleware.servers import liveness
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.liveness import ServerUnresponsive, probe_deadline
from pinning_middleware.servers.registry import Endpoint


def state() -> ConnectionState:
    endpoint: Any = Endpoint("replica1", "default")
    return ConnectionState(endpoint, True)


def test_answer_while_the_socket_was_being_shut_down_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The connection cannot be used any more, although the probe has its answer."""
    monkeypatch.setattr(liveness, "DEADLINE", 0.01)
    near, far = socket.socketpair()
    far.settimeout(10)

    def probe() -> None:
        with probe_deadline(SimpleNamespace(fileno=near.fileno), state()):
            assert far.recv(1) == b""

    with near, far, pytest.raises(ServerUnresponsive):
        probe()


def test_socket_of_a_probe_that_was_answered_is_left_alone() -> None:
    near, far = socket.socketpair()
    with near, far:
        with probe_deadline(SimpleNamespace(fileno=near.fileno), state()):
            pass
        near.sendall(b"x")
        assert far.recv(1) == b"x"
