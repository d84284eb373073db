"""Users with two devices each, over HTTP; every device records what it wrote and saw."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import traceback
from collections.abc import Callable
from http.cookies import SimpleCookie
from typing import Any, Final
from urllib.parse import urlencode

from .history import Error, Operation, Recorder

__all__ = ["Device", "run"]

DEVICES: Final = ("1", "2")
WRITES: Final = (
    *("orm", "get", "transaction", "cursor", "bulk"),
    *("stream", "after", "task", "by-task"),
)
SHARE_OF_WRITES: Final = 0.2
# Minimum and maximum number of reads in one request, each of which chooses a server.
READS_PER_REQUEST: Final = (1, 6)
# Number of writes after which a device begins a new list, so that reads do not become slower.
WRITES_PER_LIST: Final = 200
# Seconds. A request that takes longer is given up, and recorded without an answer.
TIMEOUT: Final = 20.0
THINK_TIME: Final = (0.005, 0.03)
# Seconds between two questions whether a write after the response is done.
WRITTEN_INTERVAL: Final = 0.01


class Device:
    """A browser of a user: cookies, one connection, a list of its own."""

    def __init__(self, user: str, number: str, port: int, seed: int) -> None:
        self.user, self._name = user, f"{user}-{number}"
        self._port = port
        self._random = random.Random(f"{seed}-{self._name}")
        self._cookies: dict[str, tuple[str, float]] = {}
        self._lists = self._written = 0
        self._connection = self._connect()

    @property
    def session(self) -> str:
        """The name of the list that the device appends to."""
        return f"{self._name}.{self._lists}" if self._lists else self._name

    def act(self, own: list[str], others: list[str]) -> list[Operation]:
        """Read, or write and read; return one operation for each read."""
        time.sleep(self._random.uniform(*THINK_TIME))
        lists = [*own, self._random.choice(others)] if others else own
        if self._random.random() < SHARE_OF_WRITES:
            return self._write(self._random.choice(WRITES), lists)
        reads = [f"{self._random.randint(*READS_PER_REQUEST)}"]
        return self._request("read", "GET", "/read/", {"list": lists, "reads": reads})

    def _write(self, how: str, lists: list[str]) -> list[Operation]:
        self._written += 1
        query = {"to": [self.session], "number": [str(self._written)]}
        if how == "after":
            done = [self._write_after(query)]
        else:
            method = "GET" if how == "get" else "POST"
            done = self._request(how, method, f"/write/{how}/", {"list": lists, **query})
        wrote = [each._replace(wrote=self._written) for each in done]
        if self._written == WRITES_PER_LIST:
            self._lists, self._written = self._lists + 1, 0
        return wrote

    def _write_after(self, query: dict[str, list[str]]) -> Operation:
        """Return the operation of a write that begins after its response, once it has ended."""
        (done,) = self._request("after", "POST", "/write/after/", query)
        is_pending = done.succeeded
        while is_pending and done.ended - done.began < TIMEOUT:
            (seen,) = self._request("after", "GET", "/written/", query)
            done = done._replace(ended=seen.ended, status=seen.status)
            is_pending = seen.status == 404
            if is_pending:
                time.sleep(WRITTEN_INTERVAL)
        return done

    def _request(
        self, kind: str, method: str, path: str, query: dict[str, list[str]]
    ) -> list[Operation]:
        target = f"{path}?{urlencode({'user': [self.user], **query}, doseq=True)}"
        answers: list[dict[str, Any]] = [{}]
        began = time.monotonic()
        try:
            self._connection.request(method, target, headers=self._headers())
            response = self._connection.getresponse()
            body, status = response.read(), response.status
            self._take_cookies(response)
            if status == 200:
                answers = json.loads(body)["answers"]
        except (OSError, http.client.HTTPException, ValueError):
            self._connection.close()
            self._connection = self._connect()
            status = 0
        ended, asked = time.monotonic(), query.get("list", [])
        done = Operation(self.user, self.session, kind, began, ended, status, asked=asked)
        return [done._replace(**answer) for answer in answers]

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)

    def _headers(self) -> dict[str, str]:
        now = time.monotonic()
        live = {name: value for name, (value, end) in self._cookies.items() if end > now}
        return {"Cookie": "; ".join(f"{n}={v}" for n, v in live.items())} if live else {}

    def _take_cookies(self, response: http.client.HTTPResponse) -> None:
        for header in response.msg.get_all("Set-Cookie", ()):
            for name, morsel in SimpleCookie(header).items():
                end = time.monotonic() + int(morsel["max-age"] or 0)
                self._cookies[name] = morsel.value, end


def run(
    port: int, users: int, seed: int, recorder: Recorder, is_over: Callable[[], bool]
) -> list[threading.Thread]:
    """Start a thread for each device; they end when the run is over."""
    names = [f"user{number}" for number in range(users)]
    devices = {name: [Device(name, number, port, seed) for number in DEVICES] for name in names}

    def work(device: Device) -> None:
        try:
            while not is_over():
                own = [each.session for each in devices[device.user]]
                others = [
                    each.session for name in names if name != device.user for each in devices[name]
                ]
                for operation in device.act(own, others):
                    recorder.add(operation)
        except Exception:
            recorder.add(Error(device.session, traceback.format_exc()))

    threads = [
        threading.Thread(target=work, args=(device,)) for name in names for device in devices[name]
    ]
    for thread in threads:
        thread.start()
    return threads
