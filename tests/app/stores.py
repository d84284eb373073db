"""Stores for tests, to be named in ``PINNING_STORES``."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest

from pinning_middleware.pins import Pins
from pinning_middleware.stores import BaseStore

# Arguments of the saves of the recording store: the response and the pins.
kept: list[tuple[Any, Pins]] = []


class RecordingStore(BaseStore):
    def load(self, request: HttpRequest) -> Pins:
        return {}

    def save(self, request: HttpRequest, response: Any, pins: Pins) -> None:
        kept.append((response, pins))


class BrokenStore(BaseStore):
    def load(self, request: HttpRequest) -> Pins:
        raise ConnectionError("load")

    def save(self, request: HttpRequest, response: Any, pins: Pins) -> None:
        raise ConnectionError("save")


class BrokenLateStore(BrokenStore):
    after_authentication = True
