from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.contenttypes.models import ContentType
from django.core.management import call_command
from django.db import connections, router
from django.db.models import Model, Prefetch, QuerySet
from django.test import override_settings

from pinning_middleware import (
    is_pinned,
    pin_this_request,
    pinning_scope,
    unpin_this_request,
    use_primary,
    use_replica,
)
from pinning_middleware.routers import PinningRouter
from pinning_middleware.testing import replicas
from tests.app.models import Account, Author, Book, Note, Tag
from tests.conftest import ROUTER, Visit, change_behind, is_replica, saved, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")

TWO_POOLS = override_settings(
    PINNING_REPLICAS={"default": ["replica1", "replica2"], "users": ["users_replica"]},
    DATABASE_ROUTERS=[ROUTER, "tests.app.routers.UsersRouter", "tests.app.routers.ElsewhereRouter"],
)


def prefetched_tag(books: QuerySet[Book]) -> Tag:
    return next(iter(books)).tags.all()[0]


# Reads that start from a book and return an instance.
FROM_A_BOOK: dict[str, Callable[[Book], Model]] = {
    "foreign key": lambda book: book.author,
    "reverse foreign key": lambda book: book.author.book_set.get(),
    "many to many": lambda book: book.tags.get(),
    "reverse many to many": lambda book: book.tags.get().book_set.get(),
    "chained": lambda book: book.tags.filter(pk=1).order_by("pk").first(),
    "iterator": lambda book: next(book.tags.iterator()),
    "in_bulk": lambda book: book.tags.in_bulk()[1],
}
# Reads that start from a manager.
FROM_NOTHING: dict[str, Callable[[], Model]] = {
    "get": lambda: Book.objects.get(),
    "iterator": lambda: next(Book.objects.iterator()),
    "in_bulk": lambda: Book.objects.in_bulk([1])[1],
    "raw": lambda: Book.objects.raw("SELECT * FROM app_book")[0],
    "select_related": lambda: Book.objects.select_related("author").get().author,
    "prefetch_related": lambda: prefetched_tag(Book.objects.prefetch_related("tags")),
    "prefetch of a foreign key": lambda: Book.objects.prefetch_related("author").get().author,
    "Prefetch": lambda: prefetched_tag(
        Book.objects.prefetch_related(Prefetch("tags", Tag.objects.order_by("pk")))
    ),
    "nested prefetch": lambda: prefetched_tag(
        Author.objects.prefetch_related("book_set__tags").get().book_set.all()
    ),
    "union": lambda: Book.objects.union(Book.objects.all())[0],
}


def name_of(instance: Any) -> str:
    return str(instance)


@pytest.fixture
def filled(named: Callable[..., None]) -> None:
    named()


@pytest.fixture
def book_with_notes() -> Book:
    """A book with two notes, which the replicas have as well."""
    book = Book.objects.create(title="noted")
    book.notes.create(text="one")
    book.notes.create(text="two")
    replicas.catch_up()
    unpin_this_request()
    return book


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("read", FROM_NOTHING.values(), ids=FROM_NOTHING.keys())
def test_reads_use_one_replica(visit: Visit, read: Callable[[], Model]) -> None:
    """All queries of an expression read one replica, and the instance belongs to the pool."""

    def action(request: Any) -> tuple[str, str | None, str]:
        instance = read()
        return name_of(instance), saved(instance), where()

    name, database, decided = visit(action)
    assert name == decided
    assert is_replica(name)
    assert database == "default"


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("read", FROM_A_BOOK.values(), ids=FROM_A_BOOK.keys())
@pytest.mark.parametrize("origin", ["default", "replica1", "replica2"])
def test_related_reads_use_the_replica_of_the_scope(
    visit: Visit, read: Callable[[Book], Model], origin: str
) -> None:
    def action(request: Any) -> tuple[str, str]:
        return name_of(read(Book.objects.using(origin).get())), where()

    for _ in range(2):
        name, decided = visit(action)
        assert name == decided
        assert is_replica(name)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("origin", ["default", "replica1", "replica2"])
def test_refresh_from_db_reads_the_replica_of_the_scope(visit: Visit, origin: str) -> None:
    def action(request: Any) -> tuple[str, str]:
        book = Book.objects.using(origin).get()
        book.title = "changed"
        book.refresh_from_db()
        return book.title, where()

    title, decided = visit(action)
    assert title == decided
    assert is_replica(title)


def test_refresh_after_create_reads_the_primary(visit: Visit) -> None:
    """The new row is read from the primary, where it was written."""

    def action(request: Any) -> str:
        book = Book.objects.create(title="new")
        book.refresh_from_db()
        return book.title

    assert visit(action) == "new"


@pytest.mark.usefixtures("filled")
def test_instance_of_a_replica_does_not_bypass_a_pin(visit: Visit) -> None:
    def action(request: Any) -> str:
        book = Book.objects.get()
        pin_this_request()
        return name_of(book.author)

    assert visit(action) == "default"


@pytest.mark.usefixtures("filled")
def test_instance_of_a_database_outside_the_pool_is_ignored(visit: Visit) -> None:
    def action(request: Any) -> str:
        return router.db_for_read(Book, instance=Account(pk=1))

    assert is_replica(visit(action))


@pytest.mark.parametrize(
    "read",
    [
        lambda: Book.objects.count(),
        lambda: len(Book.objects.filter(title="default")),
        lambda: Book.objects.aggregate(number=__import__("django").db.models.Count("pk"))["number"],
        lambda: int(Book.objects.exists()),
        lambda: len(Book.objects.values_list("pk")),
        lambda: int(Book.objects.filter(author__name="default").exists()),
    ],
)
def test_values_and_aggregates_read_the_replica(
    visit: Visit, named: Callable[..., None], read: Any
) -> None:
    """Only the primary has the row, so a 0 was read from a replica."""
    named("default")
    assert visit(lambda request: read()) == 0

    def pinned(request: Any) -> Any:
        with use_primary():
            return read()

    assert visit(pinned) == 1


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("pinned", [False, True])
def test_async_reads_use_the_replica(browser: Any, do: Any, pinned: bool) -> None:
    """`aget`, `afirst`, `async for`, `aiterator` and similar, in async views."""
    seen = []

    async def action(request: Any) -> str:
        if pinned:
            pin_this_request()
        seen.append(name_of(await Book.objects.aget()))
        seen.append(name_of(await Book.objects.afirst()))
        seen.append(name_of((await Book.objects.ain_bulk())[1]))
        seen.extend([name_of(book) async for book in Book.objects.all()])
        seen.extend([name_of(book) async for book in Book.objects.aiterator()])
        seen.extend(
            [
                name_of(book.author)
                async for book in Book.objects.prefetch_related("author").aiterator(chunk_size=5)
            ]
        )
        book = await Book.objects.aget()
        seen.append(name_of(await book.tags.aget()))
        await book.arefresh_from_db()
        seen.append(name_of(book))
        return "done"

    browser.get(f"/async/{do(action)}/")
    assert len(seen) == 8
    assert len(set(seen)) == 1
    assert is_replica(seen[0]) is not pinned


# Writes that start from an instance read from a replica.


WRITES: dict[str, Callable[[Book], Any]] = {
    "save": lambda book: book.save(),
    "delete": lambda book: book.delete(),
    "save of what was copied": lambda book: Book(pk=book.pk, title="x").save(),
    "many to many add": lambda book: book.tags.add(Tag.objects.create()),
    "many to many create": lambda book: book.tags.create(),
    "many to many set": lambda book: book.tags.set([Tag.objects.create()]),
    "many to many clear": lambda book: book.tags.clear(),
    "generic create": lambda book: book.notes.create(text="three"),
    "generic add": lambda book: book.notes.add(Note(text="three"), bulk=False),
    "generic add in bulk": lambda book: book.notes.add(Note.objects.create(about=book)),
    "generic get_or_create": lambda book: book.notes.get_or_create(text="three"),
    "generic update_or_create": lambda book: book.notes.update_or_create(
        text="one", defaults={"text": "1"}
    ),
    "generic update": lambda book: book.notes.update(text="x"),
    "generic filtered update": lambda book: book.notes.filter(text="one").update(text="x"),
    "generic filtered delete": lambda book: book.notes.filter(text="one").delete(),
    "generic delete": lambda book: book.notes.all().delete(),
    "generic clear": lambda book: book.notes.clear(),
    "generic remove": lambda book: book.notes.remove(book.notes.first()),
    "generic set": lambda book: book.notes.set([]),
    "generic bulk_create": lambda book: book.notes.bulk_create(
        [
            Note(
                text="x",
                object_id=book.pk,
                content_type=ContentType.objects.db_manager("default").get_for_model(Book),
            )
        ]
    ),
    "generic update of what was prefetched": lambda book: (
        Book.objects.prefetch_related("notes").get().notes.update(text="x")
    ),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writes_use_the_primary(
    visit: Visit, book_with_notes: Book, write: Callable[[Book], Any]
) -> None:
    """Also writes of instances read from a replica, and those that call db_for_read()."""

    def action(request: Any) -> tuple[str | None, bool]:
        book = Book.objects.get()
        write(book)
        return where(), is_pinned()

    assert visit(action) == ("default", True)
    assert Book.objects.using("replica1").get().notes.using("replica1").count() == 2


@pytest.mark.parametrize("read", [lambda b: b.notes.all(), lambda b: b.notes.filter(text="one")])
def test_generic_relations_read_from_a_replica(
    visit: Visit, book_with_notes: Book, read: Any
) -> None:
    change_behind("default", "UPDATE app_note SET text = 'primary'")
    seen = visit(lambda request: [(note.text, saved(note)) for note in read(Book.objects.get())])
    assert ("one", "default") in seen


def test_generic_relations_with_an_explicit_database(visit: Visit, book_with_notes: Book) -> None:
    """`using()` and `db_manager()` take precedence."""
    for alias in ("default", "replica1", "replica2"):
        change_behind(alias, f"UPDATE app_note SET text = '{alias}'")

    def action(request: Any) -> list[str]:
        book = Book.objects.get()
        return [
            str(book.notes.using("replica2").first()),
            str(book.notes.db_manager("replica2").first()),
            str(book.notes.using("default").first()),
        ]

    assert visit(action) == ["replica2", "replica2", "default"]


def test_generic_foreign_keys(visit: Visit, book_with_notes: Book) -> None:
    """They read with `using(_state.db)`, without a router: from the primary."""

    def action(request: Any) -> tuple[str | None, str | None]:
        note = Note.objects.first()
        return saved(note), saved(note.about)

    assert visit(action) == ("default", "default")


def test_relations_between_databases_of_a_pool(visit: Visit, book_with_notes: Book) -> None:
    """An instance read from a replica may refer to one of the primary."""

    def action(request: Any) -> str:
        book = Book.objects.get()
        book.author = Author.objects.using("default").create(name="new")
        book.save()
        return name_of(Book.objects.get().author)

    assert visit(action) == "new"


# Several pools


@TWO_POOLS
def test_each_model_reads_its_own_pool(visit: Visit) -> None:
    book, account, tag = visit(lambda request: (where(), where("Account"), where("Tag")))
    assert is_replica(book)
    assert (account, tag) == ("users_replica", "elsewhere")


@TWO_POOLS
@pytest.mark.parametrize("model", [Book, Account, Tag])
def test_pin_of_one_pool_does_not_affect_others(visit: Visit, model: Any) -> None:
    def action(request: Any) -> Any:
        model.objects.create()
        return where() == "default", where("Account") == "users", is_pinned()

    book, account = model is Book, model is Account
    assert visit(action) == (book, account, book or account)
    assert visit(lambda request: (where() == "default", where("Account") == "users")) == (
        book,
        account,
    )


@TWO_POOLS
@pytest.mark.parametrize("using", [None, "default", "users"])
def test_api_with_using_affects_one_pool(visit: Visit, using: str | None) -> None:
    default, users = using in (None, "default"), using in (None, "users")

    def places() -> tuple[bool, bool]:
        return where() == "default", where("Account") == "users"

    def action(request: Any) -> None:
        with use_primary(using):
            assert places() == (default, users)
        pin_this_request(using)
        assert places() == (default, users)
        assert (is_pinned("default"), is_pinned("users"), is_pinned()) == (default, users, True)
        with use_replica(using):
            assert places() == (False, False)
        unpin_this_request("users")
        assert places() == (default, False)
        unpin_this_request("default")
        assert places() == (False, False)

    visit(action)
    assert not visit.browser.cookies


@TWO_POOLS
def test_writes_use_the_primary_of_their_pool(visit: Visit) -> None:
    def action(request: Any) -> list[str | None]:
        return [saved(model.objects.create()) for model in (Book, Account, Tag)]

    assert visit(action) == ["default", "users", "elsewhere"]


@TWO_POOLS
def test_hint_of_another_pool_is_ignored() -> None:
    with pinning_scope():
        book = Book(pk=1)
        book._state.db = "default"
        assert router.db_for_read(Account, instance=book) == "users_replica"
        assert router.db_for_write(Account, instance=book) == "users"


@override_settings(PINNING_REPLICAS={"users": ["users_replica"]})
def test_router_without_a_pool_of_default_returns_none() -> None:
    ours = router.routers[0]
    assert ours.db_for_read(Book) is None
    assert ours.db_for_write(Book) is None
    assert where() == "default"


@override_settings(DATABASE_ROUTERS=["tests.app.routers.UsersRouter", ROUTER])
def test_router_does_not_call_routers_before_it() -> None:
    with pinning_scope():
        assert where("Account") == "users"
        assert is_replica(where())


def test_router_with_few_methods_is_supported() -> None:
    class PartialRouter:
        pass

    with override_settings(DATABASE_ROUTERS=[PinningRouter(), PartialRouter()]), pinning_scope():
        assert is_replica(where())
        assert router.db_for_write(Book) == "default"


# Migrations and relations


@pytest.mark.parametrize(
    ("alias", "answer"),
    [("default", None), ("replica1", False), ("replica2", False), ("elsewhere", None)],
)
def test_replicas_are_not_migrated(alias: str, answer: bool | None) -> None:
    ours = router.routers[0]
    assert ours.allow_migrate(alias, "app", model_name="book") is answer
    assert router.allow_migrate(alias, "app") is (answer is None)


def test_migrate_does_nothing_on_a_replica(capsys: pytest.CaptureFixture[str]) -> None:
    tables = connections["replica1"].introspection.table_names()
    call_command("migrate", database="replica1", run_syncdb=True, verbosity=0)
    assert connections["replica1"].introspection.table_names() == tables


@TWO_POOLS
@pytest.mark.parametrize(
    ("one", "other", "answer"),
    [
        ("default", "replica1", True),
        ("replica1", "replica2", True),
        ("default", "default", True),
        ("users", "users_replica", True),
        ("default", "users", None),
        ("replica1", "users_replica", None),
        ("default", "elsewhere", None),
        ("elsewhere", "elsewhere", None),
        (None, "default", None),
        (None, None, None),
    ],
)
def test_relations_inside_a_pool_are_allowed(
    one: str | None, other: str | None, answer: bool | None
) -> None:
    book, author = Book(), Author()
    book._state.db, author._state.db = one, other
    assert router.routers[0].allow_relation(book, author) is answer
    assert router.routers[0].allow_relation(author, book) is answer


def test_async_writes_use_the_primary() -> None:
    async def write() -> list[str | None]:
        with pinning_scope():
            book = await Book.objects.acreate(title="x")
            await book.asave()
            await Book.objects.filter(pk=book.pk).aupdate(title="y")
            return [saved(book), where()]

    assert async_to_sync(write)() == ["default", "default"]
