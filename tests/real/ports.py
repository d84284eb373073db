"""A read that returns the port of the server that answers it, with the primary key of a model."""

from __future__ import annotations

from typing import Final

PORT_QUERY: Final = {
    "postgresql": "SELECT 1 AS id, inet_server_port() AS port",
    "mysql": "SELECT 1 AS id, @@port AS port",
}
