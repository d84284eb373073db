"""The socket of a read that is given up."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from pinning_middleware.servers.blocked_reads import BlockedRead
from pinning_middleware.servers.budget import READ_BUDGET, BudgetExhausted, read_budget
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.liveness import ServerUnresponsive
from pinning_middleware.servers.registry import Endpoint


def read_on(descriptor: int) -> BlockedRead:
    endpoint: Any = Endpoint("replica1", "default")
    return BlockedRead(ConnectionState(endpoint, True), descriptor)


def is_open(one: socket.socket, other: socket.socket) -> bool:
    one.sendall(b"x")
    other.settimeout(5)
    return other.recv(1) == b"x"


def test_socket_of_a_read_that_is_given_up_is_shut_down() -> None:
    near, far = socket.socketpair()
    with near, far:
        read_on(near.fileno()).give_up()
        assert far.recv(1) == b""


def test_descriptor_that_was_reused_is_left_alone() -> None:
    """The driver closes its socket before the read has ended for the package."""
    near, far = socket.socketpair()
    number = near.fileno()
    read = read_on(number)
    near.close()
    far.close()
    one, other = socket.socketpair()
    with one, other:
        if one.fileno() != number:
            os.dup2(one.fileno(), number)
        before = len(os.listdir("/proc/self/fd"))
        read.give_up()
        assert len(os.listdir("/proc/self/fd")) == before
        assert is_open(one, other)
        if one.fileno() != number:
            os.close(number)


@pytest.mark.parametrize(("left", "expected"), [(1.4, ServerUnresponsive), (0.3, BudgetExhausted)])
def test_read_with_little_budget_left_ends_without_a_verdict_on_its_server(
    left: float, expected: type[Exception]
) -> None:
    near, far = socket.socketpair()
    with near, far:
        read_budget.renew()
        read_budget.spend(READ_BUDGET - left)
        try:
            assert type(read_on(near.fileno()).error()) is expected
        finally:
            read_budget.renew()
