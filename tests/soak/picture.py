"""Draw a run as SVG: how long requests took, which server answered, and the faults meanwhile."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Final

from .history import History, Operation

__all__ = ["draw"]

WIDTH, LEFT, RIGHT, CHART, GAP, TOP = 1200, 60, 20, 180, 46, 40
COLORS: Final = ("#2b6cb0", "#c07a00", "#2f855a", "#805ad5", "#b83280", "#52606d")
# Maximum number of points. Each covers an interval: its longest request, and its answers.
POINTS: Final = 600
STYLE: Final = """\
    .card { fill: #fbfbfa; } .text { fill: #1d2733; } .quiet { fill: #52606d; }
    .fault { fill: #c53030; opacity: .13; } .fault:hover { opacity: .4; }
    .failed { fill: #c53030; } .axis { stroke: #b4c0cc; }
    .line { fill: none; stroke-width: 1.5; }"""


class Chart:
    """Lines over the time of a run."""

    def __init__(self, history: History) -> None:
        self._begin = min(each.began for each in history.operations)
        self.seconds = history.seconds
        self.step = max(self.seconds / POINTS, 0.1)

    def x(self, time: float) -> float:
        share = min(max((time - self._begin) / self.seconds, 0), 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def point(self, operation: Operation) -> int:
        return int((operation.ended - self._begin) / self.step)

    def lines(
        self, title: str, top: float, values: dict[str, dict[int, float]], unit: str
    ) -> Iterator[str]:
        most = max((value for each in values.values() for value in each.values()), default=0) or 1
        base = top + CHART
        yield f'<text class="text" x="{LEFT}" y="{top - 10}">{escape(title)}</text>'
        for share in (0, 0.5, 1):
            y = base - share * CHART
            yield f'<path class="axis" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>'
            yield f'<text class="quiet" x="4" y="{y + 4}">{share * most:.3g} {unit}</text>'
        for index, (name, each) in enumerate(sorted(values.items())):
            color = COLORS[index % len(COLORS)]
            dots = " ".join(
                f"{self.x(self._begin + (number + 0.5) * self.step):.1f},"
                f"{base - each.get(number, 0) / most * CHART:.1f}"
                for number in range(int(self.seconds / self.step) + 1)
            )
            yield f'<polyline class="line" stroke="{color}" points="{dots}"/>'
            x = LEFT + 260 + index * 120
            yield f'<text fill="{color}" x="{x}" y="{top - 10}">{escape(name)}</text>'


def draw(history: History, folder: Path) -> Path:
    """Write the picture into the folder and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "soak.svg"
    path.write_text(picture(history))
    return path


def picture(history: History) -> str:
    chart = Chart(history)
    longest: dict[str, dict[int, float]] = {"reads": {}, "writes": {}}
    answers: dict[str, Counter[int]] = defaultdict(Counter)
    for each in history.operations:
        durations = longest["reads" if each.wrote is None else "writes"]
        at = chart.point(each)
        durations[at] = max(durations.get(at, 0), each.ended - each.began)
        if each.server:
            answers[each.server][at] += 1
    rates = {
        server: {at: count / chart.step for at, count in counted.items()}
        for server, counted in answers.items()
    }
    height = TOP + 2 * (CHART + GAP)
    second = TOP + CHART + GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="system-ui, sans-serif" font-size="12">',
            f"<style>\n{STYLE}\n</style>",
            f'<rect class="card" width="{WIDTH}" height="{height}"/>',
            *_faults(history, chart, height - GAP),
            *chart.lines("Longest request", TOP, longest, "s"),
            *chart.lines("Answers by server (port)", second, rates, "/s"),
            *(
                f'<circle class="failed" cx="{chart.x(each.ended):.1f}" cy="{TOP + CHART}" r="3">'
                f"<title>{each.kind}: status {each.status}</title></circle>"
                for each in history.operations
                if not each.succeeded
            ),
            f'<text class="quiet" x="{LEFT}" y="{height - 18}">{chart.seconds:.0f} s; red: faults '
            "(point at one for its name), dots: requests without success</text>",
            "</svg>\n",
        ]
    )


def _faults(history: History, chart: Chart, bottom: float) -> Iterator[str]:
    for fault in history.faults:
        left = chart.x(fault.began)
        width = max(chart.x(fault.end) - left, 1)
        yield (
            f'<rect class="fault" x="{left:.1f}" y="{TOP}" width="{width:.1f}" '
            f'height="{bottom - TOP}"><title>{escape(fault.name)}</title></rect>'
        )
