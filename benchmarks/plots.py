"""Draw the pictures of ``docs/benchmarks.md`` from its tables: ``python -m benchmarks.plots``."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Final, NamedTuple

DOCS: Final = Path(__file__).parents[1] / "docs"
PAGE: Final = DOCS / "benchmarks.md"

WIDTH, LEFT, BAR, GAP, TOP = 760, 325, 14, 14, 56
STYLE: Final = """\
    .card { fill: #fbfbfa; } .text { fill: #1d2733; } .quiet { fill: #52606d; }
    .good { fill: #2b6cb0; } .bad { fill: #c07a00; }
    @media (prefers-color-scheme: dark) {
      .card { fill: #1b2027; } .text { fill: #eef2f6; } .quiet { fill: #b4c0cc; }
      .good { fill: #76aee6; } .bad { fill: #e0a93b; }
    }"""


class Bars(NamedTuple):
    """A pair of bars for each row of a table: labels, values of both, and their unit."""

    title: str
    good: str
    bad: str
    unit: str
    rows: list[tuple[str, float, float]]


def table(heading: str) -> list[list[str]]:
    """Return the cells of the rows of the first table below a heading."""
    section = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def number(text: str) -> float:
    """Return the first number of a cell."""
    found = re.search(r"[\d.]+", text.replace(",", ""))
    return float(found[0]) if found else 0.0


def share(cell: str) -> float:
    """Return the percentage in parentheses, or 0."""
    found = re.search(r"\(([\d.]+) %\)", cell)
    return float(found[1]) if found else 0.0


def pictures() -> dict[str, str]:
    """Return each picture by the name of its file."""
    stale = [(row[0], number(row[3]), share(row[2])) for row in table("Stale reads")]
    waits = [
        (row[0], number(row[1]), number(row[2])) for row in table("Servers that do not answer")
    ]
    capacity = [(row[0], number(row[3]), number(row[2])) for row in table("Capacity")]
    return {
        "benchmark-capacity.svg": draw(
            Bars("Reads a second", "pinning_middleware", "without pins", "", capacity)
        ),
        "benchmark-stale.svg": draw(
            Bars("Reads while replicas lag", "on replicas", "stale", "%", stale)
        ),
        "benchmark-waits.svg": draw(
            Bars("The longest read", "with a budget", "without", "s", waits)
        ),
    }


def draw(bars: Bars) -> str:
    """Return a horizontal bar chart as SVG."""
    most = max(max(good, bad) for _, good, bad in bars.rows)
    scale = (WIDTH - LEFT - 90) / most
    height = TOP + len(bars.rows) * (2 * BAR + GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img" aria-labelledby="title">',
        f'  <title id="title">{escape(bars.title)}</title>',
        f"  <style>\n{STYLE}\n  </style>",
        f'  <rect class="card" width="{WIDTH}" height="{height}" rx="8"/>',
        f'  <text class="text" x="20" y="28" font-size="15">{escape(bars.title)}</text>',
        f'  <rect class="good" x="{LEFT}" y="17" width="12" height="12"/>',
        f'  <text class="quiet" x="{LEFT + 18}" y="28">{escape(bars.good)}</text>',
        f'  <rect class="bad" x="{LEFT + 150}" y="17" width="12" height="12"/>',
        f'  <text class="quiet" x="{LEFT + 168}" y="28">{escape(bars.bad)}</text>',
    ]
    for index, (label, good, bad) in enumerate(bars.rows):
        y = TOP + index * (2 * BAR + GAP)
        text = escape(label.replace("`", ""))
        parts.append(f'  <text class="text" x="20" y="{y + BAR + 4}">{text}</text>')
        for row, (kind, value) in enumerate((("good", good), ("bad", bad))):
            top, width = y + row * BAR, value * scale
            parts += [
                f'  <rect class="{kind}" x="{LEFT}" y="{top}" width="{width:.1f}" '
                f'height="{BAR - 2}"/>',
                f'  <text class="quiet" x="{LEFT + width + 6:.1f}" y="{top + BAR - 3}" '
                f'font-size="11">{f"{value:g} {bars.unit}".strip()}</text>',
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    for name, picture in pictures().items():
        (DOCS / "_static" / name).write_text(picture)


if __name__ == "__main__":
    main()
