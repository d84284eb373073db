"""``docs/benchmarks.md`` agrees with the benchmarks, and its pictures with its tables."""

from __future__ import annotations

import re

from benchmarks import plots
from benchmarks.__main__ import NAMES

from .contrib.pages import DOCS

PAGE = (DOCS / "benchmarks.md").read_text()


def test_pictures_are_drawn_from_the_tables() -> None:
    for name, picture in plots.pictures().items():
        assert (DOCS / "_static" / name).read_text() == picture, "run python -m benchmarks.plots"
        assert picture.count('class="good"') > 4


def test_every_benchmark_is_on_the_page() -> None:
    assert set(re.findall(r"python -m benchmarks[ .](\w+)", PAGE)) == {*NAMES, "plots", "other"}
