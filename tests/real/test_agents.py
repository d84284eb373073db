"""Agents and pools that hand out proxies of the driver's connection."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from .agent_site import AGENTS
from .conftest import NODES, PostgreSQL
from .layouts import frozen, missing

pytestmark = pytest.mark.real

MODULES = {"sqlalchemy": "dj_db_conn_pool"}


@pytest.mark.parametrize("agent", AGENTS)
def test_frozen_replica_is_noticed_through_a_proxy(pg: PostgreSQL, agent: str) -> None:
    if importlib.util.find_spec(MODULES.get(agent, agent)) is None:
        missing(f"{agent} is missing")
    entries = [json.dumps(pg.cluster.database(NODES[alias], "site")) for alias in ("pg", "pg1")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.real.agent_site", agent, *entries],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == f"answered by {pg['pg1'].port}\n"
            # Otherwise this tests nothing.
            assert process.stdout.readline() == "proxy False\n"
            with frozen(pg["pg1"]):
                output = process.communicate("go on\n", timeout=20)[0]
            assert output == f"answered by {pg['pg'].port}\n"
        finally:
            process.kill()
