"""
A site on django-async-backend, for one scenario.

    python -m tests.real.async_site SCENARIO PRIMARY REPLICA      (entries of DATABASES as JSON)

Prints what the scenario has found, as JSON.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg

ENGINE = "django_async_backend.db.backends.postgresql"


def configure(primary: dict[str, Any], replica: dict[str, Any]) -> None:
    import django
    from django.conf import settings

    settings.configure(
        ALLOWED_HOSTS=["*"],
        DATABASES={
            "default": {**primary, "ENGINE": ENGINE},
            "replica1": {**replica, "ENGINE": ENGINE},
        },
        DATABASE_ROUTERS=["pinning_middleware.routers.PinningRouter"],
        INSTALLED_APPS=["django_async_backend", "pinning_middleware"],
        LOGGING_CONFIG=None,
        MIDDLEWARE=["pinning_middleware.middleware.PinningMiddleware"],
        PINNING_REPLICAS=["replica1"],
        ROOT_URLCONF=__name__,
        SECRET_KEY="only for tests",
        USE_TZ=True,
    )
    django.setup()


def model() -> Any:
    from django.db import models
    from django_async_backend.db.models.base import AsyncModelMixin

    class Note(AsyncModelMixin, models.Model):  # type: ignore[misc]
        text = models.CharField(max_length=40)

        class Meta:
            app_label, db_table = "pinning_middleware", "async_note"

        def __str__(self) -> str:
            return self.text

    return Note


class Site:
    """The views of the site are actions: coroutine functions without arguments."""

    def __init__(self, replica: dict[str, Any]) -> None:
        from django.test import AsyncClient

        self.note = model()
        self.new_client = AsyncClient
        self._replica = f"host={replica['HOST']} port={replica['PORT']} user={replica['USER']}"

    def replica(self, sql: str) -> Any:
        with psycopg.connect(f"{self._replica} dbname=site", autocommit=True) as connection:
            return connection.execute(sql).fetchone()

    async def visit(self, action: Callable[[], Awaitable[Any]], client: Any = None) -> Any:
        """Run an action inside a request and return its result."""
        global current
        current = action
        response = await (client or self.new_client()).get("/")
        return json.loads(response.content)

    async def where(self) -> str:
        """Read, and return the alias that served."""
        from pinning_middleware.utils import counters

        counters.reads.clear()
        await self.note.async_objects.acount()
        ((_, alias, _, reason),) = counters.reads
        return f"{alias}: {reason}"

    async def write(self, text: str = "new") -> None:
        await self.note.async_objects.acreate(text=text)


async def eventually(condition: Callable[[], Any]) -> bool:
    """Poll until the condition holds; return whether it did in time."""
    for _ in range(1000):
        found = condition()
        if await found if inspect.isawaitable(found) else found:
            return True
        await asyncio.sleep(0.01)
    return False


current: Callable[[], Awaitable[Any]]


async def view(request: Any) -> Any:
    from django.http import JsonResponse

    return JsonResponse(await current(), safe=False)


async def transaction(site: Site) -> Any:
    from django_async_backend.db.transaction import async_atomic

    async def act() -> Any:
        found = [await site.where()]
        async with async_atomic():
            found.append(await site.where())
            async with async_atomic():
                found.append(await site.where())
        async with async_atomic("replica1"):
            found.append(await site.where())
        return [*found, await site.where()]

    return await site.visit(act)


async def own_write(site: Site) -> Any:
    """Reads of the request that wrote, of its client and of another, while the replica lags."""
    client = site.new_client()

    async def write() -> Any:
        before = await site.where()
        await site.write()
        return [before, await site.where()]

    site.replica("SELECT pg_wal_replay_pause()")
    try:
        found = await site.visit(write, client)
        assert client.cookies["pinning"].value
        return [*found, *[await site.visit(site.where, each) for each in (client, None)]]
    finally:
        site.replica("SELECT pg_wal_replay_resume()")


async def write_in_transaction(site: Site) -> Any:
    from django_async_backend.db import async_connections
    from django_async_backend.db.transaction import async_atomic

    from pinning_middleware.scopes.scope import current_scope

    async def act() -> Any:
        def is_visible() -> bool:
            (state,) = current_scope().pools.values()
            return all(write.visible_at is not None for write in state.writes.values())

        async with async_atomic():
            await site.write()
            found = [is_visible()]
        found.append(is_visible())
        async with await async_connections["default"].cursor() as cursor:
            await cursor.execute("BEGIN")
            await cursor.execute("INSERT INTO async_note (text) VALUES ('raw')")
            found.append(is_visible())
            await cursor.execute("COMMIT")
        return [*found, is_visible()]

    return await site.visit(act)


async def raw_write(site: Site) -> Any:
    from django_async_backend.db import async_connections, async_new_connection

    async def raw() -> Any:
        async with await async_connections["default"].cursor() as cursor:
            await cursor.execute("UPDATE async_note SET text = 'x'")
        return await site.where()

    async def copied() -> Any:
        connection = async_connections["default"].copy()
        async with await connection.cursor() as cursor:
            await cursor.execute("UPDATE async_note SET text = 'x'")
        await connection.close()
        return await site.where()

    async def other_task() -> Any:
        await asyncio.gather(async_new_connection(site.write()))
        return await site.where()

    return [await site.visit(action) for action in (raw, copied, other_task)]


async def guard(site: Site) -> Any:
    from django_async_backend.db import async_connections

    from pinning_middleware import ReplicaWriteError

    async def act() -> Any:
        found = []
        async with await async_connections["replica1"].cursor() as cursor:
            for sql in ("INSERT INTO async_note (text) VALUES ('x')", "SELECT 1"):
                try:
                    await cursor.execute(sql)
                except ReplicaWriteError:
                    found.append("rejected")
                else:
                    found.append("ran")
        try:
            await site.note(text="x").asave(using="replica1", force_insert=True)
        except ReplicaWriteError:
            found.append("rejected")
        return found

    return await site.visit(act)


async def named_replica(site: Site) -> Any:
    """Reads that name the replica after a write."""
    from pinning_middleware import no_failover, use_replica
    from pinning_middleware.utils import counters

    async def read() -> str:
        counters.reads.clear()
        await site.note.async_objects.using("replica1").acount()
        ((_, alias, _, reason),) = counters.reads
        return f"{alias}: {reason}"

    async def act() -> Any:
        found = [await read()]
        await site.write()
        found.append(await read())
        with use_replica():
            found.append(await site.where())
        with no_failover():
            found.append(await read())
        return found

    return await site.visit(act)


async def instances(site: Site) -> Any:
    async def act() -> Any:
        note = await site.note.async_objects.afirst()
        return [note._state.db, await site.where()]

    await site.visit(site.write)
    assert await eventually(lambda: site.replica("SELECT count(*) FROM async_note")[0])
    return await site.visit(act)


async def catching_up(site: Site) -> Any:
    """A client whose write the replica has replayed."""
    client = site.new_client()
    await site.visit(site.write, client)
    pinned, found = "default: not_caught_up", [""]

    async def read() -> bool:
        found[0] = await site.visit(site.where, client)
        return found[0] != pinned

    assert await eventually(read)
    return found[0]


async def another_users_write(site: Site) -> Any:
    """A row that the paused replica does not have, found by another client."""
    from pinning_middleware import retry_404

    async def find() -> str:
        note = await site.note.async_objects.aget(text="new")
        return str(note.text)

    async def find_or_none() -> str | None:
        try:
            return await find()
        except site.note.DoesNotExist:
            return None

    site.replica("SELECT pg_wal_replay_pause()")
    try:
        await site.visit(site.write)
        return [await site.visit(find_or_none), await site.visit(retry_404(find))]
    finally:
        site.replica("SELECT pg_wal_replay_resume()")


async def dead_replica(site: Site) -> Any:
    """The alias of the replica resolves to a port that nothing listens on."""
    return [await site.visit(site.where) for _ in range(3)]


async def session_state(site: Site) -> Any:
    from django_async_backend.db import async_connections

    async def act() -> Any:
        async with await async_connections["default"].cursor() as cursor:
            await cursor.execute("SET work_mem = '5MB'")
        return await site.where()

    return await site.visit(act)


async def checks(site: Site) -> Any:
    from django.core.checks import run_checks

    return [[message.id, message.msg] for message in run_checks(tags=["pinning"])]


def main(scenario: str, primary: str, replica: str) -> None:
    from django.urls import path

    global urlpatterns
    configure(json.loads(primary), json.loads(replica))
    urlpatterns = [path("", view)]
    print(json.dumps(asyncio.run(globals()[scenario](Site(json.loads(replica))))))


urlpatterns: list[Any] = []

if __name__ == "__main__":
    # The URLs are those of the imported module.
    from tests.real import async_site

    async_site.main(*sys.argv[1:])
