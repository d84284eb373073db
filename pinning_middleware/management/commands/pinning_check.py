"""``manage.py pinning_check``: check the settings and, with ``--live``, the replicas."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from typing import Any

from django.core.checks import ERROR, WARNING, CheckMessage, run_checks
from django.core.management.base import BaseCommand, CommandError
from django.db import Error

from pinning_middleware.checks.messages import TAG
from pinning_middleware.checks.servers import check_balanced_by_a_pooler, check_evictions
from pinning_middleware.conf import conf
from pinning_middleware.management.live_check import (
    MissingPrivilege,
    ReplicaResult,
    check_pool,
    missing_privileges,
)
from pinning_middleware.management.poll import ServerPoll, silence_server_logs
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.stats import DEGRADED, DOWN, OK, ServerState


class Command(BaseCommand):
    help = (
        "Check the settings of pinning_middleware. With --live, also write a row to the primary of "
        "each pool, measure how long each replica takes to show it, and verify the routing "
        "decisions in the meantime. The row and its table are removed afterwards. Exit status: 0 "
        "no issues; 1 a warning, or a replica that is misconfigured or did not show the row in "
        "time; 2 an error, or a decision that would have hidden the row from its writer."
    )
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--live", action="store_true", help="Write a row and watch replicas.")
        parser.add_argument("--pool", metavar="ALIAS", help="Check only the pool of this primary.")
        parser.add_argument(
            "--timeout",
            type=float,
            default=10.0,
            metavar="SECONDS",
            help="Maximum time to wait for the replicas (default: 10).",
        )
        parser.add_argument("--json", action="store_true", help="Print a JSON object.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Run the checks, print the results, and set the exit status."""
        messages = run_checks(tags=[TAG])
        results: dict[str, dict[str, Any]] = {}
        has_errors = any(each.level >= ERROR and not each.is_silenced() for each in messages)
        # The settings of the pools may be among the errors.
        chosen = [] if has_errors else self._pools(options["pool"])
        if options["live"] and has_errors:
            self.stderr.write("The replicas were not checked. Fix the errors first.")
        elif options["live"]:
            with _sigterm_as_exit(), silence_server_logs(), ServerPoll() as server_poll:
                # Do not wait for a primary that the poll has found unresponsive.
                states = {row.alias: row for row in server_poll.poll()}
                messages += check_balanced_by_a_pooler(databases=_balanced(chosen))
                messages += check_evictions()
                for pool in chosen:
                    found = _check_live(
                        pool,
                        options["timeout"],
                        _primary_problem(states.get(pool.primary)),
                        server_poll.misconfigured,
                    )
                    # SLAVE_DATABASES may be a second pool of this primary.
                    known = results.get(pool.primary)
                    results[pool.primary] = found if known is None else _merged(known, found)
        messages = [each for each in messages if not each.is_silenced()]
        status = max([_status(messages), *(pool["status"] for pool in results.values())])
        if options["json"]:
            report = {
                "time": time.time(),
                "status": status,
                "checks": [
                    {"id": m.id, "level": m.level, "message": m.msg, "hint": m.hint}
                    for m in messages
                ],
                "pools": {name: _as_json(pool) for name, pool in results.items()},
            }
            self.stdout.write(json.dumps(report, indent=2))
        else:
            self._print(messages, results)
        if status:
            sys.exit(status)

    def _pools(self, alias: str | None) -> list[Pool]:
        try:
            return [pool for pool in pools().of_primary(alias) if pool.replicas]
        except ValueError as error:
            raise CommandError(str(error)) from None

    def _print(self, messages: list[CheckMessage], results: dict[str, dict[str, Any]]) -> None:
        for message in messages:
            style = self.style.ERROR if message.level >= ERROR else self.style.WARNING
            self.stdout.write(style(str(message)))
        if not messages:
            self.stdout.write(
                self.style.SUCCESS("System check identified no issues (pinning_middleware).")
            )
        for name, pool in results.items():
            self.stdout.write(f"\nPool {name}: a pin lasts at most {conf.seconds:g} s.")
            if pool["error"]:
                self.stdout.write(self.style.ERROR(f"  No row was written: {pool['error']}"))
            for result in pool["replicas"]:
                self._print_result(result)
            for missing in pool["missing_privileges"]:
                text = f"  {missing.alias} lacks {missing.privilege}: {missing.purpose}."
                self.stdout.write(self.style.NOTICE(text))

    def _print_result(self, result: ReplicaResult) -> None:
        self.stdout.write(f"  {result.alias} {result.address}: {_summary(result)}")
        if result.error:
            self.stdout.write(self.style.ERROR(f"    error: {' '.join(result.error.split())}"))
        for sample in result.samples:
            row = "row visible" if sample.visible else "row missing"
            wrong = "" if sample.correct else "  WRONG"
            line = f"    {sample.at:7.3f} s  {sample.served:<8}{sample.reason:<15}{row}{wrong}"
            self.stdout.write(line if sample.correct else self.style.ERROR(line))


def _summary(result: ReplicaResult) -> str:
    if result.visible_after is None:
        return "the row was not visible in time"
    if result.detected_after is None:
        return f"row visible after {result.visible_after:.3f} s, not detected"
    return (
        f"row visible after {result.visible_after:.3f} s, "
        f"detected after {result.detected_after:.3f} s"
    )


def _check_live(
    pool: Pool, seconds: float, problem: str, misconfigured: Mapping[str, str]
) -> dict[str, Any]:
    results: list[ReplicaResult] = []
    missing: list[MissingPrivilege] = []
    try:
        if not problem:
            results = [
                each._replace(error=each.error or misconfigured.get(each.alias, ""))
                for each in check_pool(pool, seconds)
            ]
            missing = missing_privileges(pool)
    except Error as error:
        problem = " ".join([str(error).strip(), *getattr(error, "__notes__", ())])
    if problem or not all(each.correct for each in results):
        status = DOWN
    elif any(each.visible_after is None or each.error for each in results):
        status = DEGRADED
    else:
        status = OK
    return {"status": status, "error": problem, "replicas": results, "missing_privileges": missing}


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the result of two pools of one primary."""
    return {
        "status": max(one["status"], other["status"]),
        "error": one["error"] or other["error"],
        "replicas": [*one["replicas"], *other["replicas"]],
        "missing_privileges": [
            *one["missing_privileges"],
            *(m for m in other["missing_privileges"] if m not in one["missing_privileges"]),
        ],
    }


def _balanced(pools: list[Pool]) -> list[str]:
    endpoints = [each for pool in pools for each in (pool.endpoint, *pool.endpoints.values())]
    return [endpoint.alias for endpoint in endpoints if endpoint.splits_reads_and_writes]


def _primary_problem(row: ServerState | None) -> str:
    """Return why no row can be written to a primary, or "" if it can."""
    if row is None:
        return ""
    if row.state == "out":
        return row.error or row.reason
    if row.role == "replica":
        return f"{row.alias} is read-only, because it is connected to a replica ({row.address})"
    return ""


def _as_json(pool: dict[str, Any]) -> dict[str, Any]:
    replicas = [
        {
            **result._asdict(),
            "samples": [{**each._asdict(), "correct": each.correct} for each in result.samples],
        }
        for result in pool["replicas"]
    ]
    missing = [each._asdict() for each in pool["missing_privileges"]]
    return {**pool, "replicas": replicas, "missing_privileges": missing}


def _status(messages: list[CheckMessage]) -> int:
    worst = max((message.level for message in messages), default=0)
    return DOWN if worst >= ERROR else DEGRADED if worst >= WARNING else OK


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, so that the table is dropped as on Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
