"""Addresses of aliases that move, are slow, or reset connections."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress
from typing import Final

from tests.real.layouts import Forwarder
from tests.real.layouts.addresses import CHUNK

__all__ = ["Link"]

# Closing the socket sends a RST, with nothing of what is still unsent.
# https://man7.org/linux/man-pages/man7/socket.7.html (SO_LINGER)
RESET: Final = struct.pack("ii", 1, 0)


class Link(Forwarder):
    """
    The address of an alias, which forwards to its server.

    ``delay``: seconds by which every chunk is late. ``resets``: whether a connection is reset in
    the middle of the next result.
    """

    delay = 0.0
    resets = False

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        is_result = sink.getsockname()[1] == self.port
        near = sink if is_result else source
        with suppress(OSError):
            while data := source.recv(CHUNK):
                if self.delay:
                    time.sleep(self.delay)
                if self.resets and is_result:
                    sink.sendall(data[: len(data) // 2])
                    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    break
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(_how_to_shut(one))


def _how_to_shut(one: socket.socket) -> int:
    """Return how to wake the thread that reads a socket; without a FIN if it is to be reset."""
    is_reset = one.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(RESET)) == RESET
    return socket.SHUT_RD if is_reset else socket.SHUT_RDWR
