from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.conf import settings
from django.core.checks import run_checks
from django.db import connections
from django.test import modify_settings, override_settings

import pinning_middleware
from pinning_middleware.checks import project
from pinning_middleware.conf import DEFAULTS, MULTIDB_ALIASES
from pinning_middleware.stores import BaseStore, CookieStore
from tests.conftest import MIDDLEWARE, ROUTER

E, W = "pinning_middleware.E", "pinning_middleware.W"


class Anything:
    """Not a valid value of any setting, with a constant repr()."""

    def __repr__(self) -> str:
        return "Anything()"


NOT_SECONDS = [-1, "15", None, True, float("nan"), float("inf"), [15], Anything()]
NOT_BOOL = ["False", 0, 1, None, []]
NOT_A_NAME = ["", "a b", "a;b", "a=b", "é", None, 5, "a\n"]
NOT_STRINGS = ["text", [5], [""], None, {"a": 1}, 5]

BAD: list[tuple[str, list[Any], str]] = [
    (
        "PINNING_REPLICAS",
        [
            "replica1",
            5,
            None,
            {"replica1"},
            [5],
            [["replica1"]],
            [{"replica1": 1}],
            ["replica1", "replica1"],
            {"default": "replica1"},
            {"default": {"replica1": -1}},
            {"default": {"replica1": 1.5}},
            {"default": {"replica1": True}},
            {"default": {"replica1": "2"}},
            {"default": [None]},
            {5: ["replica1"]},
            {"replica1": {"groups": ["reports"]}},
            {"default": {"replica1": {"weight": "2"}}},
            {"default": {"replica1": {"tier": 0}}},
            {"default": {"replica1": {"tier": "2"}}},
            {"default": {"replica1": {"tier": True}}},
            {"default": {"replica1": {"groups": "reports"}}},
            {"default": {"replica1": {"groups": [""]}}},
            {"default": {"replica1": {"groups": None}}},
            {"default": {"replica1": {"group": ["reports"]}}},
        ],
        "E001",
    ),
    ("PINNING_REPLICAS", [["typo"], {"typo": ["replica1"]}, {"default": {"typo": 1}}], "E002"),
    (
        "PINNING_REPLICAS",
        [
            ["default"],
            {"default": ["replica1"], "users": ["replica1"]},
            {"default": ["users"], "users": ["replica1"]},
        ],
        "E003",
    ),
    (
        "PINNING_REPLICAS",
        [
            {"default": {"replica1": 1_000_003, "replica2": 999_983}},
            {"default": {"replica1": 1001, "replica2": 1}},
        ],
        "E021",
    ),
    ("SLAVE_DATABASES", ["slave", [5], ["typo"], {"slave": 1}], "E004"),
    ("PINNING_SECONDS", NOT_SECONDS, "E005"),
    ("PINNING_WAIT", NOT_SECONDS, "E005"),
    ("PINNING_RETRY_AFTER", NOT_SECONDS, "E005"),
    ("PINNING_MAX_LAG", [value for value in NOT_SECONDS if value is not None], "E005"),
    ("PINNING_POSITIONS", ["False", "wal", 0, 1, None, []], "E015"),
    ("PINNING_OFFLOAD", ["typo", "no.such", ".offload", None, 5, 0, 1], "E016"),
    ("PINNING_RETRY_404", [0, 5, -0.1, 1.5, "True", None, [], float("nan")], "E026"),
    (
        "PINNING_DRY_RUN",
        [2, "default", ["default"], {"users": "2"}, {"users": -1}, {"typo": 2}],
        "E027",
    ),
    ("PINNING_PRIMARY_MODELS", NOT_STRINGS, "E017"),
    ("PINNING_PRIMARY_MODELS", [["aut"], ["app.Boook"], ["nothing"]], "E018"),
    ("PINNING_OFFLOAD_OUTSIDE_REQUESTS", NOT_BOOL, "E006"),
    ("PINNING_ENABLED", NOT_BOOL, "E006"),
    ("PINNING_COOKIE_HTTPONLY", NOT_BOOL, "E006"),
    ("PINNING_BALANCE_BY", ["queries", None, True, []], "E007"),
    ("PINNING_PRIMARY_DOWN", ["fresh", None, True], "E007"),
    ("PINNING_CONSISTENCY", ["none", None, True], "E007"),
    (
        "PINNING_STORES",
        [
            *NOT_STRINGS,
            ["typo"],
            ["pinning_middleware.stores.Typo"],
            ["no.such.module"],
            [".stores.CookieStore"],
            ["pinning_middleware.stores.user_key"],
            ["pinning_middleware.stores.BaseStore"],
            ["tests.test_checks.MADE"],
        ],
        "E008",
    ),
    ("PINNING_COOKIE_NAME", NOT_A_NAME, "E009"),
    ("PINNING_HEADER_NAME", [*NOT_A_NAME, "Pinning_Token"], "E009"),
    ("PINNING_COOKIE_DOMAIN", [5, True, []], "E010"),
    ("PINNING_COOKIE_PATH", [5, True, [], "shop", ""], "E010"),
    ("PINNING_COOKIE_SECURE", ["yes", 1, []], "E010"),
    ("PINNING_COOKIE_SAMESITE", ["laxer", True, []], "E010"),
    ("PINNING_CACHE", ["typo", None, 5, ["default"]], "E011"),
    ("PINNING_USER_KEY", ["typo", "no.such", None, 5, "pinning_middleware.stores.typo"], "E012"),
    ("PINNING_PRIMARY_METHODS", [*NOT_STRINGS, ["post"]], "E013"),
    ("PINNING_IGNORED_TABLES", NOT_STRINGS, "E014"),
    ("PINNING_WRITING_FUNCTIONS", [*NOT_STRINGS, ["f()"], ["a b"], ["a.b.c"]], "E022"),
    ("PINNING_SESSION_SETUP", ["typo", "no.such", 5, True, []], "E023"),
]
GOOD: list[tuple[str, list[Any]]] = [
    (
        "PINNING_REPLICAS",
        [
            [],
            (),
            {},
            ("replica1",),
            {"default": []},
            {"default": ("replica1", "replica2"), "users": {"users_replica": 3}},
            {"default": {"replica1": 1, "replica2": 0}},
            {"default": {"replica1": 2000, "replica2": 1000}},
            {"default": {"replica1": {}, "replica2": {"weight": 0, "tier": 2}}},
            {"default": {"replica1": 1, "replica2": {"groups": ("reports", "exports")}}},
        ],
    ),
    ("SLAVE_DATABASES", [[], ["slave"], ("slave",), ["replica1"]]),
    ("PINNING_SECONDS", [0, 0.5, 3600]),
    ("PINNING_WAIT", [0, 0.05]),
    ("PINNING_MAX_LAG", [None, 0, 5]),
    ("PINNING_BALANCE_BY", ["query", "user"]),
    ("PINNING_PRIMARY_DOWN", ["stale"]),
    ("PINNING_CONSISTENCY", ["monotonic-reads"]),
    (
        "PINNING_STORES",
        [("tests.app.stores.RecordingStore",), ["tests.test_checks.AsyncStore"]],
    ),
    ("PINNING_COOKIE_NAME", ["sticky", "sticky_one"]),
    ("PINNING_COOKIE_PATH", ["/", "/shop"]),
    ("PINNING_POSITIONS", [True, False, "lsn", "gtid", "xid"]),
    ("PINNING_OFFLOAD", [True, False, "tests.test_checks.found"]),
    ("PINNING_PRIMARY_MODELS", [(), ["auth"], ["app.Book", "AUTH.user"]]),
    ("PINNING_COOKIE_SECURE", [True, False, None]),
    ("PINNING_COOKIE_SAMESITE", ["Lax", "lax", "Strict", False]),
    ("PINNING_COOKIE_DOMAIN", ["example.com"]),
    ("PINNING_USER_KEY", ["pinning_middleware.stores.user_key"]),
    ("PINNING_PRIMARY_METHODS", [(), ["POST"], {"POST"}]),
    ("PINNING_IGNORED_TABLES", [(), ["app_hits"], ["public.app_hits"]]),
    ("PINNING_WRITING_FUNCTIONS", [(), ["log_access"], ("audit.log_access", "F$1")]),
    ("PINNING_RETRY_404", [True, False, 0.05, 1, 1.0]),
    ("PINNING_SESSION_SETUP", [None, "tests.test_checks.found"]),
]
DRAINED_REPORTS = {"weight": 0, "groups": ["reports"]}
# The IDs whose message names the wrong entry in place of the whole value.
NAMES_AN_ENTRY = {"E002", "E003", "E018", "E021"}


def found() -> list[Any]:
    return list(run_checks(tags=["pinning"]))


def test_invalid_replicas_of_the_legacy_interface_are_an_error_beside_a_dry_run() -> None:
    with override_settings(SLAVE_DATABASES=5, PINNING_REPLICAS=[], PINNING_DRY_RUN={"default": 2}):
        assert "pinning_middleware.E004" in [message.id for message in found()]


def each(rows: list[Any]) -> list[Any]:
    return [
        pytest.param(name, value, *rest, id=f"{name}={value!r:.50}")
        for name, values, *rest in rows
        for value in values
    ]


@pytest.mark.parametrize(("name", "value", "number"), each(BAD))
def test_invalid_value_is_an_error_with_a_hint(name: str, value: Any, number: str) -> None:
    with override_settings(**{name: value}):
        messages = found()
    assert {message.id for message in messages} == {f"pinning_middleware.{number}"}
    for message in messages:
        assert message.msg.startswith(name)
        assert names_what_is_wrong(message, value)
        assert message.hint
        assert message.is_serious()


def names_what_is_wrong(message: Any, value: Any) -> bool:
    entry = message.msg.startswith("PINNING_STORES contains") or " DATABASES" in message.msg
    if entry or message.id[-4:] in NAMES_AN_ENTRY:
        return f", not {value!r}" not in message.msg and "'" in message.msg
    return repr(value) in message.msg


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"PINNING_REPLICAS": ["replica1", "typo"]}, "contains 'typo', which is not an alias of"),
        ({"PINNING_REPLICAS": ["default"]}, "lists 'default' as a replica of itself."),
        (
            {"PINNING_REPLICAS": {"default": ["replica1"], "users": ["replica1"]}},
            "lists 'replica1' as a replica of more than one primary.",
        ),
        (
            {"PINNING_REPLICAS": {"default": ["users"], "users": ["replica1"]}},
            "lists 'users' as a primary and as a replica of 'default'.",
        ),
        (
            {"PINNING_STORES": ["no.such.Store"]},
            "contains 'no.such.Store', which cannot be imported (No module named 'no').",
        ),
        ({"PINNING_STORES": ["tests.test_checks.MADE"]}, "MADE', which is not a class."),
        ({"PINNING_STORES": ["pinning_middleware.stores.BaseStore"]}, "does not provide load, sav"),
        ({"PINNING_PRIMARY_MODELS": ["auth", "nothing"]}, "contains 'nothing', which is not the"),
        (
            {"PINNING_OFFLOAD": "no.such.function"},
            "not 'no.such.function' (No module named 'no').",
        ),
        ({"PINNING_USER_KEY": "typo"}, "not 'typo' (typo doesn't look like a module path)."),
    ],
)
def test_message_names_what_is_wrong(values: dict[str, Any], text: str) -> None:
    with override_settings(**values):
        (message,) = found()
    assert text in message.msg


@pytest.fixture
def multidb_site(settings: Any) -> Any:
    """A site of django-multidb-router that has changed its dotted paths only."""
    del settings.PINNING_REPLICAS
    older = "pinning_middleware.contrib.multidb"
    settings.DATABASE_ROUTERS = [f"{older}.PinningReplicaRouter"]
    settings.MIDDLEWARE = [f"{older}.middleware.PinningRouterMiddleware", *settings.MIDDLEWARE[1:]]
    return settings


@pytest.mark.parametrize(
    ("name", "value", "number"),
    each(
        [(older, values, n) for name, values, n in BAD for older in MULTIDB_ALIASES.get(name, ())],
    ),
)
def test_invalid_value_of_a_multidb_setting_is_the_same_error(
    name: str, value: Any, number: str, multidb_site: Any
) -> None:
    """The message has the name that the site uses."""
    setattr(multidb_site, name, value)
    messages = found()
    # The legacy interface uses this setting as well, and allows no mapping.
    also = {f"{E}004"} if name == "SLAVE_DATABASES" and isinstance(value, dict) else set()
    assert {message.id for message in messages} == {f"pinning_middleware.{number}"} | also
    for message in messages:
        assert message.msg.startswith(name)
        assert names_what_is_wrong(message, value)


@pytest.mark.parametrize("name", [name for names in MULTIDB_ALIASES.values() for name in names])
def test_multidb_setting_is_checked_only_if_it_is_used(name: str, multidb_site: Any) -> None:
    setattr(multidb_site, name, ["typo"])
    ours = next(ours for ours, olders in MULTIDB_ALIASES.items() if name in olders)
    setattr(multidb_site, ours, DEFAULTS[ours])
    expected = {f"{E}004"} if name == "SLAVE_DATABASES" else {f"{W}201"}
    assert {message.id for message in found()} == expected


@pytest.mark.parametrize(
    ("number", "values", "names"),
    [
        ("W002", {"MIDDLEWARE": []}, "REPLICA_DATABASES"),
        ("W003", {"DATABASE_ROUTERS": []}, "REPLICA_DATABASES"),
        ("W004", {"PINNING_STORES": []}, "PINNING_STORES"),
        ("W005", {"REPLICA_DATABASES": {"default": {"replica1": 0}}}, "'default'"),
        ("W006", {"MULTIDB_PINNING_COOKIE_SAMESITE": "None"}, "SameSite=None"),
        ("E019", {"MULTIDB_PINNING_COOKIE": "sessionid"}, "MULTIDB_PINNING_COOKIE is"),
    ],
)
def test_conflict_of_a_multidb_setting_is_reported_under_its_name(
    number: str, values: dict[str, Any], names: str, multidb_site: Any
) -> None:
    multidb_site.REPLICA_DATABASES = ["replica1", "replica2"]
    with override_settings(**values):
        (message,) = found()
    assert message.id == f"pinning_middleware.{number}"
    assert names in message.msg


def test_hint_has_the_name_that_the_site_uses(multidb_site: Any) -> None:
    multidb_site.MULTIDB_PINNING_COOKIE_SAMESITE = "None"
    multidb_site.MULTIDB_PINNING_COOKIE_SECURE = False
    (message,) = found()
    assert message.hint.startswith("Set MULTIDB_PINNING_COOKIE_SECURE = True")


def test_replicas_of_a_multidb_setting_are_checked(
    multidb_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    multidb_site.REPLICA_DATABASES = ["replica1", "replica2"]
    assert found() == []
    monkeypatch.setitem(settings.DATABASES["replica1"], "ATOMIC_REQUESTS", True)
    multidb_site.DATABASE_ROUTERS += ["tests.test_checks.ByHand"]
    assert {message.id for message in found()} == {f"{W}010", f"{W}011"}


@pytest.mark.django_db(databases=["default"])
@override_settings(PINNING_REPLICAS="replica1")
def test_invalid_replicas_do_not_break_other_checks() -> None:
    """`check --database`, `migrate`, and every `check` as of Django 6.1."""
    assert [message.id for message in run_checks(databases=["default"])] == [f"{E}001"]


@pytest.mark.parametrize(("name", "value"), each(GOOD))
def test_valid_value_has_no_message(name: str, value: Any) -> None:
    with override_settings(**{name: value}):
        assert found() == []


def test_defaults_are_valid() -> None:
    assert found() == []
    with override_settings(**DEFAULTS):
        assert found() == []


def test_every_setting_is_checked() -> None:
    assert set(DEFAULTS) == {name for name, *_ in BAD} - {"SLAVE_DATABASES"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("PINNING_SECOND", "Did you mean PINNING_SECONDS?"),
        ("PINNING_COOKIE_SAME_SITE", "Did you mean PINNING_COOKIE_SAMESITE?"),
        ("PINNING_REPLICA", "Did you mean PINNING_REPLICAS?"),
        ("PINNING_QQQQQQQQQQQQQQQQQQQQ", "Set one of PINNING_REPLICAS, "),
    ],
)
def test_unknown_setting_is_a_warning(name: str, hint: str) -> None:
    with override_settings(**{name: 5}):
        (message,) = found()
    assert message.id == f"{W}001"
    assert name in message.msg
    assert message.hint.startswith(hint)


@pytest.mark.parametrize(
    ("name", "value", "number"),
    [
        ("MIDDLEWARE", [], "002"),
        ("MIDDLEWARE", ["tests.app.middleware.SyncMiddleware", MIDDLEWARE], "002"),
        ("MIDDLEWARE", ["no.such.Middleware"], "002"),
        ("DATABASE_ROUTERS", [], "003"),
        ("DATABASE_ROUTERS", ["tests.app.routers.UsersRouter", ROUTER], "003"),
    ],
)
def test_missing_or_later_entry_is_a_warning(name: str, value: Any, number: str) -> None:
    with override_settings(**{name: value}):
        (message,) = found()
        assert message.id == f"{W}{number}"
        assert message.hint
        absent = not {MIDDLEWARE, ROUTER} & set(value)
        assert ("is missing from" if absent else "is not the first entry of") in message.msg
        with override_settings(PINNING_REPLICAS=[]):
            assert found() == [], "without replicas there is nothing to report"


MEMCACHED = "django.core.cache.backends.memcached.PyMemcacheCache"
LOCAL = "django.core.cache.backends.locmem.LocMemCache"
IN_DATABASE = {
    "BACKEND": "django.core.cache.backends.db.DatabaseCache",
    "LOCATION": "pages_cache",
}
SHARED = {
    "BACKEND": "django.core.cache.backends.redis.RedisCache",
    "LOCATION": "redis://127.0.0.1:1",
}
STORES = ["pinning_middleware.stores.CookieStore", "pinning_middleware.stores.CacheStore"]


class ByHand:
    """A hand-written router."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "replica2"


class ByFlag:
    """A router that returns a replica only while a flag of the request is set."""

    flag = False

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "replica2" if self.flag else "default"


class UsersOnly:
    """A router that assigns every model to another primary than `default`."""

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "users"


class ByParts:
    """A router with a primary for one model and a replica for another."""

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return {"author": "users", "book": "replica2"}.get(model._meta.model_name)


class OwnCookies(CookieStore):
    """A subclass of a site."""


class AsyncStore(BaseStore):
    """A store with async methods only."""

    async def aload(self, request: Any) -> Any:
        return {}

    async def asave(self, request: Any, response: Any, pins: Any) -> None:
        pass


MADE = CookieStore()


def memcached(backend: str, **options: Any) -> dict[str, Any]:
    entry = {
        "BACKEND": f"django.core.cache.backends.memcached.{backend}",
        "LOCATION": "127.0.0.1:1",
        "OPTIONS": options,
    }
    return {"PINNING_STORES": STORES, "CACHES": {"default": entry}}


BOUNDED = {"connect_timeout": 500, "receive_timeout": 500_000}

FITS: list[tuple[str, dict[str, Any]]] = [
    ("W004", {"PINNING_STORES": []}),
    ("W005", {"PINNING_REPLICAS": {"default": {"replica1": 0}}}),
    ("W006", {"PINNING_COOKIE_SAMESITE": "None"}),
    ("W006", {"SESSION_COOKIE_SAMESITE": "none"}),
    ("W007", {"PINNING_COOKIE_NAME": "__Host-pinning"}),
    (
        "W007",
        {
            "PINNING_COOKIE_NAME": "__Host-pinning",
            "PINNING_COOKIE_SECURE": True,
            "PINNING_COOKIE_DOMAIN": "example.com",
        },
    ),
    ("W007", {"PINNING_COOKIE_NAME": "__Secure-pinning"}),
    ("W008", {"PINNING_STORES": STORES, "CACHES": {"default": {"BACKEND": LOCAL}}}),
    (
        "W009",
        {
            "PINNING_STORES": STORES,
            "CACHES": {"default": {"BACKEND": MEMCACHED, "LOCATION": "127.0.0.1:1"}},
        },
    ),
    ("W009", memcached("PyMemcacheCache", connect_timeout=0.5)),
    ("W009", memcached("PyMemcacheCache", timeout=None, connect_timeout=0.5)),
    ("W009", memcached("PyLibMCCache")),
    ("W009", memcached("PyLibMCCache", behaviors={"ketama": True})),
    (
        "W006",
        {
            "PINNING_COOKIE_SAMESITE": "None",
            "PINNING_STORES": ["tests.test_checks.OwnCookies"],
        },
    ),
    ("W011", {"DATABASE_ROUTERS": [ROUTER, "tests.test_checks.ByHand"]}),
    ("W011", {"DATABASE_ROUTERS": [ROUTER, "tests.test_checks.ByParts"]}),
    ("W011", {"DATABASE_ROUTERS": [ROUTER, "tests.test_checks.ByFlag"]}),
    ("W012", {"PINNING_IGNORED_TABLES": ["django_session"]}),
    ("W012", {"PINNING_IGNORED_TABLES": ["auth_user"]}),
    ("W013", {"CACHES": {"default": IN_DATABASE}}),
    ("W013", {"CACHES": {"default": IN_DATABASE}, "PINNING_STORES": STORES}),
    ("W013", {"CACHES": {"default": SHARED, "pages": IN_DATABASE}}),
    ("W014", {"PINNING_CONSISTENCY": "monotonic-reads", "PINNING_POSITIONS": False}),
    ("E019", {"PINNING_COOKIE_NAME": "sessionid"}),
    ("E019", {"PINNING_COOKIE_NAME": "csrftoken"}),
    ("E019", {"PINNING_COOKIE_NAME": "messages"}),
    ("E019", {"SESSION_COOKIE_NAME": "a-seen", "PINNING_COOKIE_NAME": "a"}),
    ("W016", {"PINNING_IGNORED_TABLES": ["app.Book"]}),
    ("W016", {"PINNING_IGNORED_TABLES": ["app.book"]}),
    ("W016", {"PINNING_IGNORED_TABLES": ["shop.Order"]}),
    ("E024", {"PINNING_REPLICAS": {"users": ["default"]}}),
    ("W030", {"PINNING_REPLICAS": {"default": {"replica1": {"groups": ["reports"]}}}}),
    ("W031", {"PINNING_REPLICAS": {"default": {"replica1": 1, "replica2": DRAINED_REPORTS}}}),
    ("E020", {"PINNING_HEADER_NAME": "Set-Cookie"}),
    ("E020", {"PINNING_HEADER_NAME": "cache-control"}),
    ("E020", {"PINNING_HEADER_NAME": "Content-Encoding"}),
    ("E020", {"PINNING_HEADER_NAME": "User-Agent"}),
]


@pytest.mark.parametrize(("number", "values"), FITS)
def test_conflict_in_the_project_has_a_message_with_a_hint(
    number: str, values: dict[str, Any]
) -> None:
    with override_settings(**values):
        messages = found()
    # A router also causes W203, which has its replacement.
    said = {message.id for message in messages} - {f"{W}203"}
    assert said == {f"pinning_middleware.{number}"}
    assert all(message.hint for message in messages)


def test_atomic_requests_on_a_replica_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.DATABASES["replica1"], "ATOMIC_REQUESTS", True)
    (message,) = found()
    assert message.id == f"{W}010"
    assert "'replica1'" in message.msg


@pytest.mark.parametrize(
    "values",
    [
        {"PINNING_COOKIE_SAMESITE": "None", "PINNING_COOKIE_SECURE": True},
        {"PINNING_COOKIE_NAME": "__Host-pinning", "PINNING_COOKIE_SECURE": True},
        memcached("PyMemcacheCache", timeout=0.5, connect_timeout=0.5),
        memcached("PyLibMCCache", behaviors=BOUNDED),
        {"DATABASE_ROUTERS": [ROUTER, "tests.app.routers.UsersRouter"]},
        {"CACHES": {"default": IN_DATABASE}, "PINNING_IGNORED_TABLES": ["pages_cache"]},
        {"CACHES": {"default": IN_DATABASE}, "PINNING_IGNORED_TABLES": ["Pages_Cache"]},
        {
            "CACHES": {"default": IN_DATABASE | {"LOCATION": "PAGES"}},
            "PINNING_IGNORED_TABLES": ["pages"],
        },
        {
            "CACHES": {"default": SHARED, "pins": IN_DATABASE},
            "PINNING_CACHE": "pins",
            "PINNING_STORES": STORES,
        },
        {"CACHES": {"default": IN_DATABASE}, "PINNING_REPLICAS": []},
    ],
)
def test_project_without_conflict_has_no_message(values: dict[str, Any]) -> None:
    with override_settings(**values):
        assert found() == []


EVERY_REQUEST = {"SESSION_SAVE_EVERY_REQUEST": True}


@pytest.mark.parametrize("engine", ["db", "cached_db"])
def test_sessions_in_the_database_saved_every_request_are_reported(engine: str) -> None:
    engine = f"django.contrib.sessions.backends.{engine}"
    with override_settings(SESSION_ENGINE=engine, **EVERY_REQUEST):
        (message,) = found()
    assert message.id == f"{W}020"


@pytest.mark.parametrize(
    "values",
    [
        {"SESSION_ENGINE": "django.contrib.sessions.backends.cache"},
        {"PINNING_REPLICAS": []},
    ],
)
def test_sessions_saved_every_request_without_a_pin_have_no_message(values: dict[str, Any]) -> None:
    with override_settings(**{**EVERY_REQUEST, **values}):
        assert found() == []


SILK = "silk.middleware.SilkyMiddleware"
SILK_TABLES = {"silk_profile", "silk_profile_queries", "silk_request", "silk_response"}
SILK_TABLES |= {"silk_sqlquery"}


def test_package_that_stores_every_request_is_reported_with_its_tables() -> None:
    with modify_settings(INSTALLED_APPS={"append": "silk"}, MIDDLEWARE={"append": SILK}):
        (message,) = found()
        assert message.id == f"{W}021"
        assert set(re.findall(r"'(\w+)'", message.hint)) == SILK_TABLES
        with override_settings(PINNING_IGNORED_TABLES=sorted(SILK_TABLES)):
            assert found() == []


SHARED = {"default": {"BACKEND": "django.core.cache.backends.redis.RedisCache"}}
OF_CONSTANCE = {
    "CONSTANCE_BACKEND": "constance.backends.database.DatabaseBackend",
    "CONSTANCE_DATABASE_CACHE_BACKEND": "default",
}


@pytest.mark.parametrize(
    ("app", "values", "labels"),
    [
        ("django.contrib.sites", {}, ["sites.Site"]),
        ("constance", OF_CONSTANCE, ["constance.Constance"]),
        ("waffle", {}, ["waffle.Flag", "waffle.Switch", "waffle.Sample"]),
    ],
)
def test_models_that_are_cached_for_all_users_are_reported(
    app: str, values: dict[str, Any], labels: list[str]
) -> None:
    with (
        modify_settings(INSTALLED_APPS={"append": app}),
        override_settings(CACHES=SHARED, **values),
    ):
        (message,) = found()
        assert message.id == f"{W}022"
        assert re.findall(r"'([\w.]+)'", message.hint) == labels
        for silent in (
            {"PINNING_PRIMARY_MODELS": labels},
            {"PINNING_PRIMARY_MODELS": [app.rpartition(".")[2]]},
            {"PINNING_REPLICAS": []},
            {"PINNING_REPLICAS": {"users": ["users_replica"]}},
        ):
            with override_settings(**silent):
                assert found() == []


@pytest.mark.parametrize(
    ("values", "is_reported"),
    [
        ({}, True),
        ({"CACHALOT_DATABASES": "all_available"}, True),
        ({"CACHALOT_DATABASES": ["default", "replica1"]}, True),
        ({"CACHALOT_DATABASES": ["default"]}, False),
        ({"PINNING_REPLICAS": []}, False),
    ],
)
def test_cached_queries_of_replicas_are_reported(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], is_reported: bool
) -> None:
    monkeypatch.setattr(apps, "is_installed", lambda name: name == "cachalot")
    with override_settings(**values):
        found = list(project.check_cached_queries())
    assert [message.id for message in found] == ["pinning_middleware.W035"] * is_reported


@pytest.mark.parametrize(
    ("app", "values"),
    [
        (
            "waffle",
            {"CACHES": {"default": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}}},
        ),
        ("waffle", {"WAFFLE_CACHE_NAME": "local"}),
        ("waffle", {"WAFFLE_READ_FROM_WRITE_DB": True}),
        ("constance", {}),
        ("constance", {**OF_CONSTANCE, "CONSTANCE_DATABASE_CACHE_BACKEND": None}),
        (
            "constance",
            {**OF_CONSTANCE, "CONSTANCE_BACKEND": "constance.backends.memory.MemoryBackend"},
        ),
    ],
)
def test_models_without_a_shared_cache_are_not_reported(app: str, values: dict[str, Any]) -> None:
    local = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}
    caches = {"CACHES": {**SHARED, "local": local}, **values}
    with modify_settings(INSTALLED_APPS={"append": app}), override_settings(**caches):
        assert found() == []


def test_hint_does_not_suggest_another_warning() -> None:
    with override_settings(PINNING_IGNORED_TABLES="django_session"):
        (message,) = [message for message in found() if message.is_serious()]
    assert "django_session" not in message.hint


def test_default_as_a_replica_with_a_router_of_other_primaries_is_valid() -> None:
    routers = [ROUTER, "tests.test_checks.UsersOnly"]
    with override_settings(PINNING_REPLICAS={"users": ["default"]}, DATABASE_ROUTERS=routers):
        assert not any(message.is_serious() for message in found())


def postgresql(**changes: Any) -> dict[str, Any]:
    entry = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "shop",
        "HOST": "db.example.com",
        "USER": "web",
    }
    return connections.configure_settings({"default": {}, "pg": {**entry, **changes}})["pg"]


@contextmanager
def databases(monkeypatch: pytest.MonkeyPatch, **entries: dict[str, Any]) -> Iterator[None]:
    """Configure a pool of `pg` and `pg1` beside the databases of the tests."""
    entries = {"pg": postgresql(), "pg1": postgresql(HOST="replica.example.com"), **entries}
    with monkeypatch.context() as patch:
        for alias, entry in entries.items():
            patch.setitem(connections.settings, alias, entry)
        with override_settings(PINNING_REPLICAS={"pg": ["pg1"]}):
            yield
    for alias in entries:
        with suppress(AttributeError):
            del connections[alias]


def test_engine_that_sets_a_schema_on_one_connection_is_reported_without_session_setup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("django_tenants")
    tenants = postgresql(ENGINE="django_tenants.postgresql_backend")
    with databases(monkeypatch, pg=tenants, pg1={**tenants, "HOST": "replica.example.com"}):
        (message,) = found()
        assert message.id == f"{W}024"
        with override_settings(PINNING_SESSION_SETUP="tests.test_checks.postgresql"):
            assert found() == []


def test_interchangeable_aliases_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    with databases(monkeypatch):
        assert found() == []


@pytest.mark.parametrize("method", ["gtid", "lsn", "xid"])
def test_position_method_of_another_database_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with databases(monkeypatch), override_settings(PINNING_POSITIONS=method):
        assert [message.id for message in found()] == ([f"{W}015"] if method == "gtid" else [])


@pytest.mark.parametrize(
    "changes", [{"NAME": "other"}, {"USER": "other"}, {"OPTIONS": {"options": "-c a=b"}}]
)
def test_replica_that_is_not_interchangeable_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    with databases(monkeypatch, pg1=postgresql(HOST="replica.example.com", **changes)):
        (message,) = found()
    assert message.id == f"{W}017"
    assert "'pg1'" in message.msg


@pytest.mark.parametrize(
    ("entry", "number"),
    [
        (postgresql(), "W018"),
        (postgresql(HOST="DB.example.com", PORT="5432", USER="owner"), "W018"),
        (postgresql(NAME="other"), ""),
        (postgresql(PORT="6432"), ""),
        (postgresql(HOST="elsewhere"), ""),
    ],
)
def test_other_alias_of_the_primarys_database_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], number: str
) -> None:
    with databases(monkeypatch, direct=entry):
        messages = found()
    assert [message.id[-4:] for message in messages] == [number] * bool(number)
    assert all("'direct'" in message.msg and "'pg'" in message.msg for message in messages)


def test_ids_are_unique() -> None:
    """Each ID is used in one place, for one kind of problem, so that it can be silenced."""
    folder = Path(pinning_middleware.__file__).with_name("checks")
    source = "".join(path.read_text() for path in sorted(folder.glob("*.py")))
    parts = re.split(r"^(?:def |RULES)", source, flags=re.MULTILINE)
    used = [number for part in parts for number in set(re.findall(r'"([EW]\d{3})"', part))]
    assert sorted(used) == sorted(set(used))
    assert {f"E{n:03}" for n in range(1, 26)} | {f"W{n:03}" for n in range(1, 20)} <= set(used)
