"""
A site with an agent, or a pool, whose connections are proxies of the driver's.

    python -m tests.real.agent_site AGENT PRIMARY REPLICA      (entries of DATABASES as JSON)

Reads twice from the replica, the second time after a line on its standard input, and prints the
port of each server that answered.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def new_relic() -> Callable[[], AbstractContextManager[Any]]:
    os.environ.update(NEW_RELIC_LICENSE_KEY="x" * 40, NEW_RELIC_DEVELOPER_MODE="true")
    os.environ.update(NEW_RELIC_APP_NAME="site", NEW_RELIC_LOG="/dev/null")
    import newrelic.agent

    newrelic.agent.initialize()
    application = newrelic.agent.register_application(timeout=0.1)
    return lambda: newrelic.agent.BackgroundTask(application, "task")


def datadog() -> Callable[[], AbstractContextManager[Any]]:
    os.environ.update(DD_INSTRUMENTATION_TELEMETRY_ENABLED="false", DD_TRACE_STARTUP_LOGS="false")
    os.environ.update(DD_REMOTE_CONFIGURATION_ENABLED="false")
    import ddtrace

    ddtrace.patch(psycopg=True)
    # Nothing is listening.
    ddtrace.tracer.enabled = True
    return contextlib.nullcontext


def elastic_apm() -> Callable[[], AbstractContextManager[Any]]:
    import elasticapm

    client = elasticapm.Client(
        service_name="site", disable_send=True, central_config=False, cloud_provider="none"
    )
    elasticapm.instrument()

    @contextlib.contextmanager
    def transaction() -> Any:
        client.begin_transaction("task")
        yield
        client.end_transaction("task")

    return transaction


AGENTS = {
    "newrelic": new_relic,
    "ddtrace": datadog,
    "elasticapm": elastic_apm,
    "sqlalchemy": lambda: contextlib.nullcontext,
}
ENGINES = {"sqlalchemy": "dj_db_conn_pool.backends.postgresql"}


def main(agent: str, primary: str, replica: str) -> None:
    # Before Django imports the driver.
    transaction = AGENTS[agent]()
    import django
    from django.conf import settings

    engine = {"ENGINE": ENGINES.get(agent, "django.db.backends.postgresql")}
    settings.configure(
        DATABASES={
            "default": {**json.loads(primary), **engine},
            "replica": {**json.loads(replica), **engine},
        },
        INSTALLED_APPS=["pinning_middleware"],
        DATABASE_ROUTERS=["pinning_middleware.routers.PinningRouter"],
        PINNING_REPLICAS=["replica"],
        LOGGING_CONFIG=None,
    )
    django.setup()
    from django.db import connections

    from pinning_middleware import pinning_scope

    def read() -> None:
        with pinning_scope(), connections["replica"].cursor() as cursor:
            cursor.execute("SELECT inet_server_port()")
            row = cursor.fetchone()
        print("answered by", row[0], flush=True)

    with transaction():
        read()
        raw = connections["replica"].connection
        print("proxy", hasattr(type(raw), "wait"), flush=True)
        sys.stdin.readline()
        read()
    # Not at exit, where an agent would wait for its service.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
