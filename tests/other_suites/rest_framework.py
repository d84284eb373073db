"""
Run the tests of Django REST framework:

    python -m tests.other_suites.rest_framework [pytest's arguments]

The tests are those of the installed version, from its sdist.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from .comparison import (
    APP,
    MIDDLEWARE,
    ROUTED,
    Outcome,
    compare,
    mirrored_databases,
    open_folder,
    replaced,
    run,
    sdist,
)

# Tests that cannot pass with the package, with the reasons.
KNOWN: Final[set[str]] = set()
OPTIONS: Final = ("-rfE", "-p", "no:randomly", "-p", "no:cacheprovider", "--create-db")


def run_suite(
    folder: Path,
    name: str,
    configuration: str,
    settings: dict[str, Any],
    options: tuple[str, ...],
    arguments: list[str],
) -> Outcome:
    """Run the suite with this conftest.py and these settings."""
    (folder / "tests" / "conftest.py").write_text(configuration)
    return run(
        f"rest-framework-{name}",
        ["-m", "pytest", *OPTIONS, *options, *(arguments or ["tests"])],
        folder,
        summary=r"^=+ .*\b(?:passed|failed|error).* in .*$",
        failed=r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$",
        SUITE_SETTINGS=json.dumps(settings),
    )


def main(arguments: list[str]) -> None:
    with open_folder("rest-framework-suite") as folder:
        source = sdist("djangorestframework", folder)
        # It configures the settings itself.
        text = (source / "tests" / "conftest.py").read_text()
        text = replaced(text, "DATABASES=databases,", '**json.loads(os.environ["SUITE_SETTINGS"]),')
        plain = f"import json\n{text}"
        pinning = replaced(plain, "INSTALLED_APPS=(", f'INSTALLED_APPS=("{APP}",')
        pinning = replaced(pinning, "MIDDLEWARE=(", f'MIDDLEWARE=("{MIDDLEWARE}",')
        with mirrored_databases(folder, ("default", "secondary")) as databases:
            settings = {"DATABASES": databases}
            without = ("-p", "no:pinning_middleware")
            before = run_suite(source, "before", plain, settings, without, arguments)
            after = run_suite(source, "pinning", pinning, settings | ROUTED, (), arguments)
        compare(before, after, KNOWN)


if __name__ == "__main__":
    main(sys.argv[1:])
