"""`python -m sample_site`: run servers and the site with some data, until Ctrl-C.

`PORT` is the site's port, `SAMPLE_DATA` the folder of the servers' data. With `DATABASE_URL` and
`REPLICA1_URL`, … the site runs on those databases, and no server is started.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import django
from django.core.management import call_command
from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler

from .cluster import Cluster, ClusterError
from .programs import END_SIGNALS

HOST = "127.0.0.1"
DATABASE = "board"
LAST_PORT = 65535

WELCOME = """
The message board is at  {url}

  Sign in as  ada  or  grace  (as  admin  for {url}admin/); each password is the name.
  1. Pause both replicas in the panel, and post: your message is there at once.
  2. Open a private window beside it: it reads the replicas, and doesn't see the message.
  3. Switch pinning off in the panel: the message vanishes, until the replicas have it.
  4. Sign in as the same user in the private window: there the message is too.
  5. Press "Post and count": a background task counts it already.

  From another terminal, with a header instead of cookies:
    curl -i -u ada:ada -d text=Hello {url}api/messages/
    curl -H "Pinning-Token: …" {url}api/messages/

Ctrl-C ends it.
"""


class Ended(BaseException):
    """Raised between two steps after a signal to stop."""


class EndSignals:
    """Records whether a signal to stop was received.

    It is checked between two steps, because an exception inside a step could lose the handle of
    a server that has just been started.
    """

    def __init__(self) -> None:
        self.received = threading.Event()

    def install(self) -> None:
        """Install the signal handlers."""
        for number in END_SIGNALS:
            signal.signal(number, lambda number, frame: self.received.set())

    def say(self, message: str) -> None:
        """Print progress, flushed for pipes; raise if a signal was received."""
        if self.received.is_set():
            raise Ended
        print(message, flush=True)


def main() -> int:
    """Run the site, and return the exit code."""
    signals = EndSignals()
    signals.install()
    try:
        with bind(os.environ.get("PORT", "8000")) as server, databases(signals.say):
            serve(server, signals)
            print("\nStopping …", flush=True)
    except Ended:
        pass
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    print("Stopped; nothing is left running.", flush=True)
    return 0


def bind(port: str) -> ThreadedWSGIServer:
    """Bind the port before anything else is started."""
    if not port.isdecimal() or int(port) > LAST_PORT:
        raise ClusterError(f"PORT must be a number up to {LAST_PORT}, not {port!r}.")
    try:
        return ThreadedWSGIServer((HOST, int(port)), WSGIRequestHandler, ipv6=False)
    except OSError as error:
        other = int(port) + 1 if int(port) < LAST_PORT else 8000
        raise ClusterError(
            f"Port {port} can't be used: {error.strerror}.\n"
            f"Choose another one:  PORT={other} make demo   (or PORT={other} python -m sample_site)"
        ) from None


@contextmanager
def databases(say: Callable[[str], None]) -> Iterator[None]:
    """Provide the databases: those of the environment, or a new cluster."""
    if "DATABASE_URL" in os.environ:
        say("Using the databases of DATABASE_URL and REPLICA…_URL.")
        prepare(say)
        yield
        return
    folder = Path(os.environ.get("SAMPLE_DATA") or Path(__file__).parent / ".demo")
    say("Starting PostgreSQL: a primary and two replicas …")
    with Cluster(folder, progress=lambda line: say(f"  {line}")) as cluster:
        cluster.create_database(DATABASE)
        os.environ["DATABASE_URL"] = cluster.url("primary", DATABASE)
        for replica in cluster.replicas:
            os.environ[f"{replica.name.upper()}_URL"] = cluster.url(replica.name, DATABASE)
        prepare(say)
        cluster.wait_caught_up()
        yield


def prepare(say: Callable[[str], None]) -> None:
    """Create the tables, and some data the first time."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "sample_site.settings"
    django.setup()
    say("Creating the tables …")
    call_command("migrate", verbosity=0, interactive=False)
    say("Filling in a little data …")
    call_command("seed")
    django.db.connections.close_all()


def serve(server: ThreadedWSGIServer, signals: EndSignals) -> None:
    """Serve requests until a signal is received."""
    from .wsgi import application

    server.set_app(application)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    signals.say(WELCOME.format(url=f"http://{HOST}:{server.server_port}/"))
    # Python runs a handler in the main thread, which a signal to another thread does not wake.
    while not signals.received.wait(0.5):
        pass
    server.shutdown()


if __name__ == "__main__":
    sys.exit(main())
