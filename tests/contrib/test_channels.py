"""Channels' consumers, on replicas that lag forever."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from channels.consumer import AsyncConsumer
from channels.generic.websocket import AsyncJsonWebsocketConsumer, JsonWebsocketConsumer
from channels.testing import ApplicationCommunicator, WebsocketCommunicator
from django.contrib.auth.models import User
from django.test import Client, override_settings

from pinning_middleware import offload, unpin_this_request
from pinning_middleware.contrib.channels import PinnedConsumer
from pinning_middleware.scopes.scope import enter, entered_scope
from tests.app.models import Book
from tests.conftest import is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


def work(what: str) -> str:
    """Run the action, and return the alias of a read."""
    if what.startswith("write"):
        Book.objects.create(title="x")
    if what == "unpin":
        unpin_this_request()
    if what == "write and fail":
        raise LookupError(what)
    return where()


class Sync(PinnedConsumer, JsonWebsocketConsumer):
    def receive_json(self, content: Any, **kwargs: Any) -> None:
        try:
            answer = work(content)
        except LookupError:
            answer = "failed"
        self.send_json([answer, self.pinning_token()])


class Async(PinnedConsumer, AsyncJsonWebsocketConsumer):
    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        try:
            answer = await sync_to_async(work)(content)
        except LookupError:
            answer = "failed"
        await self.send_json([answer, await self.apinning_token()])


class Failing(PinnedConsumer, AsyncConsumer):
    async def websocket_receive(self, message: Any) -> None:
        await sync_to_async(work)("write and fail")


CONSUMERS = [Sync, Async]


class Socket(WebsocketCommunicator):
    """A client of one socket."""

    async def ask(self, what: str) -> Any:
        await self.send_json_to(what)
        return await self.receive_json_from(timeout=30)

    async def where(self, what: str = "read") -> str:
        return str((await self.ask(what))[0])


def open_socket(consumer: Any, token: str = "", **scope: Any) -> Socket:
    """Return a socket whose connecting request had this cookie."""
    headers = [(b"cookie", f"pinning={token}".encode())] if token else []
    socket = Socket(consumer.as_asgi(), "/", headers=headers)
    socket.scope.update(scope)
    return socket


def talk(act: Callable[..., Awaitable[Any]], *sockets: Socket) -> Any:
    async def run() -> Any:
        for socket in sockets:
            assert (await socket.connect(timeout=30))[0]
        found = await act(*sockets)
        for socket in sockets:
            await socket.disconnect(timeout=30)
        return found

    enter(None)
    return async_to_sync(run)()


@pytest.fixture(params=CONSUMERS, ids=["sync", "async"])
def consumer(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_next_message_reads_what_a_message_wrote(consumer: Any) -> None:
    async def act(one: Socket, other: Socket) -> list[str]:
        return [
            await one.where(),
            await one.where("write"),
            await one.where(),
            await one.where(),
            await other.where(),
        ]

    before, write, after, again, other = talk(act, open_socket(consumer), open_socket(consumer))
    assert is_replica(before)
    assert (write, after, again) == ("default", "default", "default")
    assert is_replica(other)


def test_messages_of_other_sockets_are_unaffected(consumer: Any) -> None:
    async def act(one: Socket, other: Socket) -> list[str]:
        return [await one.where("write"), await other.where(), await one.where()]

    write, other, after = talk(act, open_socket(consumer), open_socket(consumer))
    assert (write, after) == ("default", "default")
    assert is_replica(other)


def test_messages_inherit_pins_of_the_connecting_request(consumer: Any) -> None:
    async def write(socket: Socket) -> str:
        return str((await socket.ask("write"))[1])

    async def read(socket: Socket) -> str:
        return await socket.where()

    token = talk(write, open_socket(consumer))
    assert talk(read, open_socket(consumer, token)) == "default"
    assert is_replica(talk(read, open_socket(consumer, token[:-1] + "-")))


def test_socket_inherits_pins_of_the_page(consumer: Any, do: Callable[..., str]) -> None:
    client = Client()
    client.post(f"/sync/{do(lambda request: work('write'))}/")

    async def read(socket: Socket) -> str:
        return await socket.where()

    assert talk(read, open_socket(consumer, client.cookies["pinning"].value)) == "default"


def test_failed_message_pins(consumer: Any) -> None:
    async def act(socket: Socket) -> list[str]:
        return [await socket.where("write and fail"), await socket.where()]

    assert talk(act, open_socket(consumer)) == ["failed", "default"]


def test_error_that_ends_the_consumer() -> None:
    """The scope of the message ends with it."""

    async def run() -> Any:
        socket = ApplicationCommunicator(Failing.as_asgi(), {"type": "websocket"})
        await socket.send_input({"type": "websocket.receive"})
        with pytest.raises(LookupError):
            await socket.wait(30)
        return entered_scope()

    enter(None)
    assert async_to_sync(run)() is None


def test_unpin_this_request_in_a_message(consumer: Any) -> None:
    async def act(socket: Socket) -> list[str]:
        return [await socket.where("write"), await socket.where("unpin"), await socket.where()]

    write, unpin, after = talk(act, open_socket(consumer))
    assert write == "default"
    assert is_replica(unpin)
    assert is_replica(after)


def test_cache_store_shares_pins_of_pages_and_sockets(
    consumer: Any, do: Callable[..., str], settings: Any
) -> None:
    # In the database the session would lag as well.
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.cache"
    settings.PINNING_STORES = ["pinning_middleware.stores.CacheStore"]
    user = User.objects.create(username="one")
    client = Client()
    client.force_login(user)
    look = f"/sync/{do(lambda request: where())}/"
    write = f"/sync/{do(lambda request: work('write'))}/"

    def page(address: str) -> str:
        enter(None)
        return client.get(address).content.decode()

    async def act(socket: Socket) -> list[str]:
        first = await socket.where()
        await sync_to_async(page)(write)
        return [first, await socket.where()]

    async def write_in_socket(socket: Socket) -> None:
        await socket.where("write")

    before, after = talk(act, open_socket(consumer, user=user))
    assert is_replica(before)
    assert after == "default"
    other = User.objects.create(username="other")
    client.force_login(other)
    assert is_replica(page(look))
    talk(write_in_socket, open_socket(consumer, user=other))
    assert page(look) == "default"


@override_settings(
    SESSION_ENGINE="django.contrib.sessions.backends.cache",
    PINNING_STORES=["pinning_middleware.stores.CacheStore"],
)
def test_message_of_a_process_where_the_package_is_disabled_leaves_pins_of_others(
    consumer: Any,
) -> None:
    user = User.objects.create(username="one")

    async def write(socket: Socket) -> None:
        await socket.where("write")

    async def read(socket: Socket) -> str:
        return await socket.where()

    talk(write, open_socket(consumer, user=user))
    with override_settings(PINNING_ENABLED=False):
        talk(write, open_socket(consumer, user=user))
    assert talk(read, open_socket(consumer, user=user)) == "default"


class Scopeless(PinnedConsumer, AsyncJsonWebsocketConsumer):
    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        await self.send_json([repr(entered_scope())])


@override_settings(PINNING_ENABLED=False)
def test_message_has_no_scope_while_the_package_is_disabled() -> None:
    async def act(socket: Socket) -> str:
        return await socket.where()

    assert talk(act, open_socket(Scopeless)) == "None"


@pytest.mark.parametrize("store", ["BrokenStore", "BrokenLateStore"])
def test_unavailable_store_is_logged(
    consumer: Any, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(socket: Socket) -> list[str]:
        return [await socket.where("write"), await socket.where()]

    with override_settings(PINNING_STORES=[f"tests.app.stores.{store}"]):
        assert talk(act, open_socket(consumer)) == ["default", "default"]
    assert f"{store} failed to load pins" in caplog.text
    assert f"{store} failed to save pins" in caplog.text


def test_messages_ignore_context_managers_around_the_server(consumer: Any) -> None:
    async def act(socket: Socket) -> str:
        return await socket.where()

    with override_settings(PINNING_OFFLOAD=False), offload():
        assert talk(act, open_socket(consumer)) == "default"


def test_json_consumer(consumer: Any) -> None:
    """The mixin does not change the consumer's encoding."""

    async def act(socket: Socket) -> Any:
        await socket.send_to(text_data=json.dumps("read"))
        return json.loads(await socket.receive_from(timeout=30))

    alias, token = talk(act, open_socket(consumer))
    assert is_replica(alias)
    assert token is None


class SignsIn(PinnedConsumer, JsonWebsocketConsumer):
    """Its first message is the name of its user."""

    def receive_json(self, content: Any, **kwargs: Any) -> None:
        if content.startswith("user "):
            self.scope["user"] = User.objects.using("default").get(username=content[5:])
            self.send_json(["signed in"])
        else:
            self.send_json([work(content)])


def test_cache_store_follows_a_user_who_signs_in_inside_the_socket(settings: Any) -> None:
    settings.PINNING_STORES = ["pinning_middleware.stores.CacheStore"]
    for name in ("ada", "bob"):
        User.objects.create(username=name)

    async def act(one: Socket, other: Socket) -> list[str]:
        await one.ask("user ada")
        await other.ask("user ada")
        await one.ask("write")
        # The pins are saved after a message, before the next one.
        await one.ask("read")
        return [await other.where()]

    assert talk(act, open_socket(SignsIn), open_socket(SignsIn)) == ["default"]


@pytest.mark.parametrize("kind", ["write", "read"])
def test_user_who_signs_in_inside_a_socket_has_pins_of_the_own_writes_only(
    settings: Any, kind: str
) -> None:
    settings.PINNING_STORES = ["pinning_middleware.stores.CacheStore"]
    for name in ("carol", "dave"):
        User.objects.create(username=name)

    async def act(one: Socket, other: Socket) -> str:
        await one.ask("user carol")
        await other.ask("user dave")
        await one.ask(kind)
        await one.ask("read")
        return await other.where()

    assert is_replica(talk(act, open_socket(SignsIn), open_socket(SignsIn)))
