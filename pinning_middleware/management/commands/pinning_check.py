"""``manage.py pinning_check``: the settings and, with ``--live``, what replicas really do."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any

from django.core.checks import ERROR, WARNING, CheckMessage, run_checks
from django.core.management.base import BaseCommand, CommandError
from django.db import Error

from pinning_middleware.checks.settings import TAG
from pinning_middleware.conf import conf
from pinning_middleware.management.live_check import Finding, Right, missing_rights, try_pool
from pinning_middleware.management.poll import Asker, quiet
from pinning_middleware.routing.policy import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.stats import DEGRADED, DOWN


class Command(BaseCommand):
    help = (
        "Check this package's settings; with --live also write a row to each pool's primary, "
        "measure how long each replica takes to show it, and say whether what would have been "
        "decided meanwhile was true. The row and its table are removed again. Exit status: 0 all "
        "is well, 1 a warning or a replica that did not show the row in time, 2 an error, or a "
        "decision that would have hidden the row from its writer."
    )
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--live", action="store_true", help="Write, and watch the replicas.")
        parser.add_argument("--pool", metavar="ALIAS", help="The primary of the only pool to try.")
        parser.add_argument(
            "--timeout",
            type=float,
            default=10.0,
            metavar="SECONDS",
            help="How long to wait for the replicas (10).",
        )
        parser.add_argument("--json", action="store_true", help="One JSON object instead of text.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Check, print, and say by the exit status how bad it is."""
        chosen = self._pools(options["pool"])
        messages = [each for each in run_checks(tags=[TAG]) if not each.is_silenced()]
        tried: dict[str, dict[str, Any]] = {}
        if options["live"]:
            with _ended_cleanly(), quiet(), Asker() as asker:
                # A primary that says nothing is not waited for.
                out = {
                    row.alias: row.error or row.reason for row in asker.ask() if row.state == "out"
                }
                tried = {
                    pool.primary: _try(pool, options["timeout"], out.get(pool.primary, ""))
                    for pool in chosen
                }
        status = max([_badness(messages), *(pool["status"] for pool in tried.values())])
        if options["json"]:
            answer = {
                "time": time.time(),
                "status": status,
                "checks": [
                    {"id": m.id, "level": m.level, "message": m.msg, "hint": m.hint}
                    for m in messages
                ],
                "pools": {name: _as_json(pool) for name, pool in tried.items()},
            }
            self.stdout.write(json.dumps(answer, indent=2))
        else:
            self._print(messages, tried)
        if status:
            sys.exit(status)

    def _pools(self, alias: str | None) -> list[Pool]:
        try:
            return [pool for pool in pools().of_primary(alias) if pool.replicas]
        except ValueError as error:
            raise CommandError(str(error)) from None

    def _print(self, messages: list[CheckMessage], tried: dict[str, dict[str, Any]]) -> None:
        for message in messages:
            style = self.style.ERROR if message.level >= ERROR else self.style.WARNING
            self.stdout.write(style(str(message)))
        if not messages:
            self.stdout.write(self.style.SUCCESS("The settings are well."))
        for name, pool in tried.items():
            self.stdout.write(f"\nPool {name}: a pin lasts {conf.seconds:g} s at most.")
            if pool["error"]:
                self.stdout.write(self.style.ERROR(f"  No row could be written: {pool['error']}"))
            for finding in pool["replicas"]:
                self._print_finding(finding)
            for right in pool["missing_rights"]:
                self.stdout.write(
                    self.style.NOTICE(f"  {right.alias} lacks {right.right}: {right.why}.")
                )

    def _print_finding(self, found: Finding) -> None:
        self.stdout.write(f"  {found.alias} {found.address}: {_summary(found)}")
        for moment in found.moments:
            row = "the row is there" if moment.is_there else "the row is missing"
            said = "" if moment.is_true else "  WRONG"
            line = f"    {moment.at:7.3f} s  {moment.served:<8}{moment.reason:<10}{row}{said}"
            self.stdout.write(line if moment.is_true else self.style.ERROR(line))


def _summary(found: Finding) -> str:
    if found.shown_after is None:
        said = "the row was not there in time"
    elif found.known_after is None:
        said = f"there after {found.shown_after:.3f} s, not known to be"
    else:
        said = f"there after {found.shown_after:.3f} s, known after {found.known_after:.3f} s"
    return f"{said} ({' '.join(found.error.split())})" if found.error else said


def _try(pool: Pool, seconds: float, problem: str) -> dict[str, Any]:
    found: list[Finding] = []
    rights: list[Right] = []
    try:
        if not problem:
            found = try_pool(pool, seconds)
            rights = missing_rights(pool)
    except Error as error:
        problem = " ".join([str(error).strip(), *getattr(error, "__notes__", ())])
    if problem or not all(each.is_true for each in found):
        status = DOWN
    else:
        status = DEGRADED if any(each.shown_after is None for each in found) else 0
    return {"status": status, "error": problem, "replicas": found, "missing_rights": rights}


def _as_json(pool: dict[str, Any]) -> dict[str, Any]:
    replicas = [
        {
            **found._asdict(),
            "moments": [{**m._asdict(), "is_true": m.is_true} for m in found.moments],
        }
        for found in pool["replicas"]
    ]
    rights = [right._asdict() for right in pool["missing_rights"]]
    return {**pool, "replicas": replicas, "missing_rights": rights}


def _badness(messages: list[CheckMessage]) -> int:
    worst = max((message.level for message in messages), default=0)
    return DOWN if worst >= ERROR else DEGRADED if worst >= WARNING else 0


@contextlib.contextmanager
def _ended_cleanly() -> Iterator[None]:
    """Let a request to end take the row away too, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
