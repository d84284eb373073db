"""Whether two aliases differ in more than the node that they lead to."""

from __future__ import annotations

import re
from typing import Any

from django.db import connections

__all__ = ["is_interchangeable"]

# Of a database's settings and options, those that say how to get there and not what is there.
_SETTINGS = ("ENGINE", "NAME", "USER", "TIME_ZONE", "AUTOCOMMIT")
_TRANSPORT = re.compile(
    r"(?:fallback_)?application_name|channel_binding|client_flag|connect_timeout|gssencmode"
    r"|hostaddr|keepalives\w*|load_balance_hosts|passfile|password|pool|port|(?:read|write)_timeout"
    r"|requiressl|server_side_binding|ssl\w*|target_session_attrs|tcp_user_timeout|unix_socket"
)


def is_interchangeable(one: str, other: str) -> bool:
    """Return whether nothing but the node changes between two aliases, as far as SQL can see."""
    first, second = connections.settings[one], connections.settings[other]
    if any(first[part] != second[part] for part in _SETTINGS):
        return False
    return _visible(first["OPTIONS"]) == _visible(second["OPTIONS"])


def _visible(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not _TRANSPORT.fullmatch(name)}
