"""``manage.py pinning_status``: the state of every server of every pool."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import textwrap
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError
from django.db import connections

from pinning_middleware import dry_run_report
from pinning_middleware.conf import conf
from pinning_middleware.dry_run_report import DryRun
from pinning_middleware.management.poll import ServerPoll, silence_server_logs
from pinning_middleware.reasons import Reason
from pinning_middleware.routing.pools import pools
from pinning_middleware.stats import (
    DEGRADED,
    DOWN,
    HEALTH_NAMES,
    OK,
    ServerState,
    format_duration,
    format_size,
    get_stats,
    health,
    lag_threshold,
)
from pinning_middleware.stores import dry_run_counts

HEADINGS: Final = ("server", "role", "state", "weight", "reads", "position", "behind", "probed")
# Indices of columns: right-aligned ones, the state, and the position, which may be truncated.
NUMBERS: Final = (3, 4)
STATE, POSITION = 2, 5
MIN_POSITION_WIDTH: Final = 11
GAP: Final = "  "


class Command(BaseCommand):
    help = (
        "Probe every server of every pool, and print its role, whether it is in rotation, and its "
        "replication position. Exit status: 0 healthy; 1 degraded; 2 the primary of a pool is out "
        "of rotation, or none of its replicas is usable."
    )
    # The command must also run on a site that has problems.
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="Print a JSON object.")
        parser.add_argument(
            "--watch",
            nargs="?",
            type=float,
            const=2.0,
            metavar="SECONDS",
            help="Repeat every SECONDS (default: 2) until Ctrl-C.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Probe and print, repeatedly with ``--watch``; the last health is the exit status."""
        try:
            pools()
        except Exception as error:
            raise CommandError(
                f"The settings of the pools are invalid ({error!r}). Run manage.py pinning_check.",
                returncode=2,
            ) from error
        status, watch = 0, options["watch"]
        with (
            silence_server_logs(),
            ServerPoll() as server_poll,
            contextlib.suppress(KeyboardInterrupt),
        ):
            while True:
                rows = server_poll.poll()
                refused = _refused(server_poll)
                status = health(rows)
                if options["json"]:
                    self._print_json(rows, refused, status, None if watch is not None else 2)
                else:
                    self._print(rows, refused, status, clear=watch is not None)
                if watch is None:
                    break
                time.sleep(max(0.1, watch))
        if status:
            sys.exit(status)

    def _print_json(
        self,
        rows: list[ServerState],
        refused: dict[str, list[str]],
        status: int,
        indent: int | None,
    ) -> None:
        report = {
            "time": time.time(),
            "status": status,
            "enabled": conf.enabled,
            "pools": {
                pool: _pool(pool, rows, refused.get(pool, ()))
                for pool in dict.fromkeys(row.pool for row in rows)
            },
            "servers": [row._asdict() for row in rows],
            "stats": get_stats(),
        }
        if conf.dry_run:
            runs, problem = _dry_runs()
            report["dry_run"] = {run.pool: run.as_dict() for run in runs}
            report["dry_run_problem"] = problem
        self.stdout.write(json.dumps(report, indent=indent))
        self.stdout.flush()

    def _print(
        self, rows: list[ServerState], refused: dict[str, list[str]], status: int, clear: bool
    ) -> None:
        if clear and self.stdout.isatty():
            self.stdout.write("\033[H\033[2J", ending="")
        if not rows:
            self.stdout.write("PINNING_REPLICAS is empty: every read goes to the primary.")
        self._print_dry_runs()
        if not conf.enabled:
            self.stdout.write(
                self.style.WARNING("PINNING_ENABLED is False: every read goes to the primary.")
            )
        width = shutil.get_terminal_size((100, 24)).columns if self.stdout.isatty() else None
        for pool in dict.fromkeys(row.pool for row in rows):
            of_pool = [row for row in rows if row.pool == pool]
            summary = _pool(pool, rows)
            self.stdout.write(
                f"Pool {pool}: {summary['usable']} of {summary['replicas']} replicas in rotation; "
                f"lag threshold {format_duration(lag_threshold())}.\n"
            )
            table = [HEADINGS, *map(_cells, of_pool)]
            if not self._print_table(table, of_pool, width):
                self._print_records(of_pool, width)
            if names := ", ".join(refused.get(pool, ())):
                text = f"No standby can serve {names}: see PINNING_PRIMARY_MODELS."
                self.stdout.write("\n".join(_wrap(text, width, "  ")))
            self.stdout.write("")
        if rows:
            style = {OK: self.style.SUCCESS, DEGRADED: self.style.WARNING, DOWN: self.style.ERROR}
            at = time.strftime("%Y-%m-%d %H:%M:%S %z")
            self.stdout.write(f"{style[status](HEALTH_NAMES[status])} at {at}")
        self.stdout.flush()

    def _print_dry_runs(self) -> None:
        if not conf.dry_run:
            return
        runs, problem = _dry_runs()
        if problem:
            self.stdout.write(self.style.WARNING(problem))
        for run in runs:
            title, *sentences = run.summary
            self.stdout.write(f"\n{title}")
            for sentence in sentences:
                self.stdout.write(f"  {sentence}")
            for reason, number in run.reasons.items():
                share = f"{100 * number / run.reads:.1f} %"
                self.stdout.write(f"  {share:>8}  {reason}: {Reason(reason).description}")

    def _print_table(
        self, table: list[tuple[str, ...]], rows: list[ServerState], width: int | None
    ) -> bool:
        """Print the table; return False without printing if it is wider than the terminal."""
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        gaps = len(GAP) * (len(widths) - 1)
        if width is not None and sum(widths) + gaps > width:
            excess = sum(widths) + gaps - width
            widths[POSITION] = max(MIN_POSITION_WIDTH, widths[POSITION] - excess)
            if sum(widths) + gaps > width:
                return False
        for cells, row in zip(table, [None, *rows], strict=True):
            line = []
            for column, (cell, size) in enumerate(zip(cells, widths, strict=True)):
                text = _truncate(cell, size)
                line.append(text.rjust(size) if column in NUMBERS else text.ljust(size))
            if row is not None:
                line[STATE] = self._style(row)(line[STATE])
            self.stdout.write(GAP.join(line).rstrip())
            if row is not None:
                for detail in _detail_lines(row, width):
                    self.stdout.write(detail)
        return True

    def _print_records(self, rows: list[ServerState], width: int | None) -> None:
        indent = " " * 11
        for row in rows:
            self.stdout.write(row.alias)
            for name, text in zip(HEADINGS[1:], _cells(row)[1:], strict=True):
                if name == "state":
                    text = self._style(row)(text)
                self.stdout.write(f"  {name:<9}{text}")
            for name, text in _details(row).items():
                lines = _wrap(f"  {name:<9}{text}", width, indent)
                self.stdout.write("\n".join(lines))

    def _style(self, row: ServerState) -> Any:
        if row.state == "in":
            return self.style.WARNING if row.error else self.style.SUCCESS
        return self.style.ERROR if row.retry_in is not None else self.style.WARNING


def _dry_runs() -> tuple[list[DryRun], str]:
    """Return what the processes of the site have counted, and why that may not be all of it."""
    name = f"the cache {conf.cache!r} (PINNING_CACHE)"
    if not dry_run_counts.is_cache_shared():
        return dry_run_report.of_this_process(), (
            f"The site's processes do not share {name}, so this command sees only its own reads: "
            "see the status page, or use another cache."
        )
    try:
        return dry_run_report.of_all_processes(), ""
    except Exception as error:  # a cache's client may raise anything
        problem = f"The reads of the site's processes are in {name}, which fails: {error}"
        return dry_run_report.of_this_process(), problem


def _refused(server_poll: ServerPoll) -> dict[str, list[str]]:
    """Return what every standby of a pool refuses: its role, or unlogged tables."""
    found = {}
    for pool, refusal in server_poll.refusals.items():
        role = f"role {connections.settings[pool]['USER']} (serializable)"
        found[pool] = [role] if refusal.all_reads else list(refusal.tables)
    return found


def _pool(pool: str, rows: list[ServerState], refused: Sequence[str] = ()) -> dict[str, Any]:
    replicas = {row.alias: row for row in rows if row.pool == pool and row.configured == "replica"}
    usable = {row.alias for row in rows if row.alias in replicas and row.state == "in"}
    return {
        "replicas": len(replicas),
        "usable": len(usable),
        "window": conf.seconds,
        "max_lag": conf.max_lag,
        "refused": list(refused),
    }


def _cells(row: ServerState) -> tuple[str, ...]:
    role = row.role or "?"
    state = f"{row.state}: {row.reason}" if row.reason else row.state
    if row.since is not None:
        state += f", {format_duration(time.time() - row.since)}"
    behind = [] if row.behind_bytes is None else [format_size(row.behind_bytes)]
    behind += [] if row.lag is None else [format_duration(row.lag)]
    return (
        row.alias,
        role if role in (row.configured, "?") else f"{role}!",
        state,
        row.share or "-",
        str(row.reads),
        row.position or "-",
        ", ".join(behind) or "-",
        "-" if row.age is None else f"{format_duration(row.age)} ago",
    )


def _details(row: ServerState) -> dict[str, str]:
    details = {"address": row.address or "?"}
    if row.retry_in is not None:
        details["retry in"] = format_duration(row.retry_in)
    if row.error:
        details["error"] = " ".join(row.error.split())
    if row.reads_bounded is False:
        details["reads"] = "may hang: use psycopg or mysqlclient"
    return details


def _detail_lines(row: ServerState, width: int | None) -> list[str]:
    details = _details(row)
    address = f"  {details.pop('address')}"
    text = "; ".join(
        value if name == "error" else f"{name} {value}" for name, value in details.items()
    )
    line = f"{address}{GAP}{text}".rstrip()
    if width is None or len(line) <= width:
        return [line]
    return [address, *_wrap(f"  {text}", width, "  ")]


def _wrap(line: str, width: int | None, indent: str) -> list[str]:
    """Wrap a line at the width of the terminal; None means that there is no terminal."""
    if width is None or len(line) <= width:
        return [line]
    return textwrap.wrap(line, max(width, 20), subsequent_indent=indent)


def _truncate(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"
