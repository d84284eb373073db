"""``docs/contributing.md`` names the modules that exist, and the commands of the Makefile."""

from __future__ import annotations

import re
from pathlib import Path

import pinning_middleware

from .contrib.pages import DOCS

PAGE = (DOCS / "contributing.md").read_text()
PACKAGE = Path(pinning_middleware.__file__).parent
ROOT = DOCS.parent


def paths(text: str) -> list[str]:
    return re.findall(r"`([\w/]+(?:\.py|/))`", text)


def test_modules_of_the_map_exist_and_none_is_missing() -> None:
    named = paths(PAGE.partition("| layer |")[2].partition("Beside the package")[0])
    assert [path for path in named if not (PACKAGE / path).exists()] == []
    tops = {path.partition("/")[0] for path in named}
    present = {each.name for each in PACKAGE.iterdir() if not each.name.startswith("__")}
    assert present - {"py.typed"} <= tops


def test_folders_beside_the_package_exist() -> None:
    named = paths(PAGE.partition("Beside the package")[2].partition("## Add something")[0])
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", PAGE + (ROOT / "CONTRIBUTING.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
