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
WRITES: Final = ("orm", "get", "transaction", "cursor", "bulk", "stream", "task")
SHARE_OF_WRITES: Final = 0.2
# Seconds. A request that takes longer is given up, and recorded without an answer.
TIMEOUT: Final = 20.0
THINKS: Final = (0.005, 0.03)


class Device:
    """A browser of a user: cookies, one connection, a list of its own."""

    def __init__(self, user: str, number: str, port: int, seed: int) -> None:
        self.user, self.session = user, f"{user}-{number}"
        self._port = port
        self._random = random.Random(f"{seed}-{self.session}")
        self._cookies: dict[str, tuple[str, float]] = {}
        self._written = 0
        self._connection = self._connect()

    def act(self, own: list[str], others: list[str]) -> Operation:
        """Read, or write and read."""
        time.sleep(self._random.uniform(*THINKS))
        lists = [*own, self._random.choice(others)] if others else own
        if self._random.random() < SHARE_OF_WRITES:
            return self._write(self._random.choice(WRITES), lists)
        return self._request("read", "GET", "/read/", {"list": lists})

    def _write(self, how: str, lists: list[str]) -> Operation:
        self._written += 1
        query = {"list": lists, "to": [self.session], "number": [str(self._written)]}
        done = self._request(how, "GET" if how == "get" else "POST", f"/write/{how}/", query)
        return done._replace(wrote=self._written)

    def _request(self, kind: str, method: str, path: str, query: dict[str, list[str]]) -> Operation:
        target = f"{path}?{urlencode({'user': [self.user], **query}, doseq=True)}"
        began = time.monotonic()
        try:
            self._connection.request(method, target, headers=self._headers())
            response = self._connection.getresponse()
            body, status = response.read(), response.status
            self._take_cookies(response)
            answer = json.loads(body) if status == 200 else {}
        except (OSError, http.client.HTTPException, ValueError):
            self._connection.close()
            self._connection = self._connect()
            answer, status = {}, 0
        ended, asked = time.monotonic(), query["list"]
        return Operation(self.user, self.session, kind, began, ended, status, asked=asked, **answer)

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
    lists = {name: [f"{name}-{number}" for number in DEVICES] for name in names}

    def work(device: Device, own: list[str], others: list[str]) -> None:
        try:
            while not is_over():
                recorder.add(device.act(own, others))
        except Exception:
            recorder.add(Error(device.session, traceback.format_exc()))

    threads = []
    for name in names:
        others = [each for other in names if other != name for each in lists[other]]
        for number in DEVICES:
            arguments: Any = (Device(name, number, port, seed), lists[name], others)
            threads.append(threading.Thread(target=work, args=arguments))
    for thread in threads:
        thread.start()
    return threads
