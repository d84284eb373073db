"""Websockets: a scope for each message, in a plain ASGI application."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import uvicorn
from asgiref.sync import async_to_sync, sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.core.asgi import get_asgi_application
from django.db import connections
from websocket import WebSocket, create_connection

from pinning_middleware import pinning_scope
from pinning_middleware.scopes.scope import entered_scope
from tests.app.models import Book
from tests.conftest import is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

django_application = get_asgi_application()


async def application(scope: Any, receive: Any, send: Any) -> None:
    """As documented: Django handles HTTP, each message of a socket has a scope."""
    if scope["type"] != "websocket":
        await django_application(scope, receive, send)
        return
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})
    token: str | None = None
    while (event := await receive())["type"] == "websocket.receive":
        message = json.loads(event["text"])
        async with pinning_scope(message.get("token", token), isolated=True) as pinning:
            answer = await sync_to_async(work)(message["do"])
        # For the next message of this socket, and for the client: its other requests, over HTTP
        # or another socket, must see this write, too.
        token = await pinning.atoken()
        assert entered_scope() is None
        await send({"type": "websocket.send", "text": json.dumps({**answer, "token": token})})


def work(what: str) -> dict[str, Any]:
    if what == "write":
        Book.objects.create(title="x")
    return {"from": where(), "count": Book.objects.count()}


class InProcess:
    """A client of one socket, without a server."""

    def __init__(self) -> None:
        self._socket = ApplicationCommunicator(application, {"type": "websocket", "path": "/"})

    async def connect(self) -> InProcess:
        await self._socket.send_input({"type": "websocket.connect"})
        assert (await self._socket.receive_output(30))["type"] == "websocket.accept"
        return self

    async def ask(self, do: str, **message: Any) -> dict[str, Any]:
        text = json.dumps({"do": do, **message})
        await self._socket.send_input({"type": "websocket.receive", "text": text})
        answer: dict[str, Any] = json.loads((await self._socket.receive_output(30))["text"])
        return answer

    async def close(self) -> None:
        await self._socket.send_input({"type": "websocket.disconnect", "code": 1000})
        await self._socket.wait(30)


def test_each_message_has_its_own_scope() -> None:
    async def talk() -> None:
        mine, other = await InProcess().connect(), await InProcess().connect()
        answer = await mine.ask("read")
        assert (is_replica(answer["from"]), answer["token"]) == (True, None)

        answer = await mine.ask("write")
        assert (answer["from"], answer["count"]) == ("default", 1)
        assert answer["token"]

        again = await mine.ask("read")
        assert (again["from"], again["count"]) == ("default", 1)

        answer = await other.ask("read")
        assert (is_replica(answer["from"]), answer["count"]) == (True, 0)
        for one in (mine, other):
            await one.close()

    async_to_sync(talk)()


def test_token_of_another_socket_is_inherited() -> None:
    async def talk() -> None:
        mine, other = await InProcess().connect(), await InProcess().connect()
        token = (await mine.ask("write"))["token"]
        assert (await other.ask("read", token=token))["from"] == "default"
        assert is_replica((await other.ask("read", token="forged"))["from"])
        for one in (mine, other):
            await one.close()

    async_to_sync(talk)()


def test_concurrent_messages_of_sockets_are_isolated() -> None:
    """One event loop handles all of them; each message has its own scope."""

    async def talk() -> list[bool]:
        async def one(number: int) -> bool:
            client = await InProcess().connect()
            answers = [await client.ask("write" if number % 2 else "read") for _ in range(3)]
            await client.close()
            return all(is_replica(answer["from"]) for answer in answers)

        return await asyncio.gather(*(one(number) for number in range(8)))

    assert async_to_sync(talk)() == [True, False] * 4


# Under a server


@contextmanager
def served() -> Iterator[str]:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        config = uvicorn.Config(
            application, log_level="error", lifespan="off", ws="wsproto", interface="asgi3"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def ask(client: WebSocket, do: str) -> dict[str, Any]:
    client.send(json.dumps({"do": do}))
    answer: dict[str, Any] = json.loads(client.recv())
    return answer


def test_under_uvicorn() -> None:
    with (
        served() as address,
        closing(create_connection(f"ws://{address}/", timeout=30)) as mine,
        closing(create_connection(f"ws://{address}/", timeout=30)) as other,
    ):
        written = ask(mine, "write")
        assert ask(mine, "read")["from"] == "default"
        assert is_replica(ask(other, "read")["from"])
    # The token is valid for HTTP, too.
    with pinning_scope(written["token"]):
        assert where() == "default"
    connections.close_all()
