"""``manage.py pinning_status``: every server, what it is and whether reads go there."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from argparse import ArgumentParser
from typing import Any, Final

from django.core.management.base import BaseCommand

from pinning_middleware.conf import conf
from pinning_middleware.management.poll import Asker, quiet
from pinning_middleware.stats import (
    DEGRADED,
    DOWN,
    ServerState,
    get_stats,
    in_bytes,
    in_seconds,
    limit,
    verdict,
)

HEADINGS: Final = ("server", "role", "state", "weight", "reads", "position", "behind", "asked")
# Columns, by their place: flush right; the one that may be cut short, and to what.
NUMBERS: Final = (3, 4)
POSITION, STATE, SHORTEST = 5, 2, 11
GAP: Final = "  "
WORDS: Final = {0: "well", DEGRADED: "degraded", DOWN: "down"}


class Command(BaseCommand):
    help = (
        "Query every database of every pool, and say what it is, whether reads go there and how far "
        "it is. Exit status: 0 all is well, 1 degraded, 2 a pool has no usable replica or its "
        "primary is out."
    )
    # It is asked when something is wrong.
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="One JSON object instead of text.")
        parser.add_argument(
            "--watch",
            nargs="?",
            type=float,
            const=2.0,
            metavar="SECONDS",
            help="Again every so many seconds (2), until Ctrl-C.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Query, print, and again with ``--watch``; the exit status is that of the last answer."""
        status, watch = 0, options["watch"]
        with quiet(), Asker() as asker, contextlib.suppress(KeyboardInterrupt):
            while True:
                rows = asker.ask()
                status = verdict(rows)
                if options["json"]:
                    self._print_json(rows, status, None if watch is not None else 2)
                else:
                    self._print(rows, status, clear=watch is not None)
                if watch is None:
                    break
                time.sleep(max(0.1, watch))
        if status:
            sys.exit(status)

    def _print_json(self, rows: list[ServerState], status: int, indent: int | None) -> None:
        answer = {
            "time": time.time(),
            "status": status,
            "enabled": conf.enabled,
            "pools": {pool: _pool(pool, rows) for pool in dict.fromkeys(r.pool for r in rows)},
            "servers": [row._asdict() for row in rows],
            "stats": get_stats(),
        }
        self.stdout.write(json.dumps(answer, indent=indent))
        self.stdout.flush()

    def _print(self, rows: list[ServerState], status: int, clear: bool) -> None:
        if clear and self.stdout.isatty():
            self.stdout.write("\033[H\033[2J", ending="")
        if not rows:
            self.stdout.write("PINNING_REPLICAS names no replica: every read goes to its primary.")
        if not conf.enabled:
            self.stdout.write(self.style.WARNING("PINNING_ENABLED is off: no read goes to one."))
        width = shutil.get_terminal_size((100, 24)).columns
        for pool in dict.fromkeys(row.pool for row in rows):
            of_pool = [row for row in rows if row.pool == pool]
            facts = _pool(pool, rows)
            self.stdout.write(
                f"Pool {pool}: {facts['usable']} of {facts['replicas']} replicas serve; "
                f"more than {in_seconds(limit())} behind is too far.\n"
            )
            table = [HEADINGS, *map(_cells, of_pool)]
            if not (self._print_table(table, of_pool, width)):
                self._print_blocks(of_pool)
            self.stdout.write("")
        if rows:
            style = {0: self.style.SUCCESS, DEGRADED: self.style.WARNING, DOWN: self.style.ERROR}
            at = time.strftime("%Y-%m-%d %H:%M:%S %z")
            self.stdout.write(f"{style[status](WORDS[status])} at {at}")
        self.stdout.flush()

    def _print_table(
        self, table: list[tuple[str, ...]], rows: list[ServerState], width: int
    ) -> bool:
        """Print two lines for each server, unless that is wider than the terminal."""
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        spare = width - sum(widths) - len(GAP) * (len(widths) - 1)
        if spare < 0:
            widths[POSITION] = max(SHORTEST, widths[POSITION] + spare)
            if sum(widths) + len(GAP) * (len(widths) - 1) > width:
                return False
        for cells, row in zip(table, [None, *rows], strict=True):
            line = [
                _cut(cell, room).rjust(room) if place in NUMBERS else _cut(cell, room).ljust(room)
                for place, (cell, room) in enumerate(zip(cells, widths, strict=True))
            ]
            if row is not None:
                line[STATE] = self._style(row)(line[STATE])
            self.stdout.write(GAP.join(line).rstrip())
            if row is not None:
                for more in _below(row, width):
                    self.stdout.write(more)
        return True

    def _print_blocks(self, rows: list[ServerState]) -> None:
        for row in rows:
            self.stdout.write(row.alias)
            for name, text in zip(HEADINGS[1:], _cells(row)[1:], strict=True):
                if name == "state":
                    text = self._style(row)(text)
                self.stdout.write(f"  {name:<9}{text}")
            for name, text in _details(row).items():
                self.stdout.write(f"  {name:<9}{text}")

    def _style(self, row: ServerState) -> Any:
        if row.state == "in":
            return self.style.WARNING if row.error else self.style.SUCCESS
        return self.style.ERROR if row.retry_in is not None else self.style.WARNING


def _pool(pool: str, rows: list[ServerState]) -> dict[str, Any]:
    replicas = {row.alias: row for row in rows if row.pool == pool and row.configured == "replica"}
    usable = {row.alias for row in rows if row.alias in replicas and row.state == "in"}
    return {
        "replicas": len(replicas),
        "usable": len(usable),
        "window": conf.seconds,
        "max_lag": conf.max_lag,
    }


def _cells(row: ServerState) -> tuple[str, ...]:
    role = row.role or "?"
    state = f"{row.state}: {row.reason}" if row.reason else row.state
    if row.since is not None:
        state += f", {in_seconds(time.time() - row.since)}"
    behind = [] if row.behind_bytes is None else [in_bytes(row.behind_bytes)]
    behind += [] if row.lag is None else [in_seconds(row.lag)]
    return (
        row.alias,
        role if role in (row.configured, "?") else f"{role}!",
        state,
        "-" if row.weight is None else str(row.weight),
        str(row.reads),
        row.position or "-",
        ", ".join(behind) or "-",
        "-" if row.age is None else f"{in_seconds(row.age)} ago",
    )


def _details(row: ServerState) -> dict[str, str]:
    found = {"address": row.address or "?"}
    if row.retry_in is not None:
        found["retry in"] = in_seconds(row.retry_in)
    if row.error:
        found["error"] = " ".join(row.error.split())
    return found


def _below(row: ServerState, width: int) -> list[str]:
    details = _details(row)
    address = f"  {details.pop('address')}"
    text = "; ".join(
        value if name == "error" else f"{name} {value}" for name, value in details.items()
    )
    line = f"{address}{GAP}{text}".rstrip()
    if len(line) <= width:
        return [line]
    return [address, f"  {_cut(text, width - 2)}"]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"
