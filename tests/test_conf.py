from __future__ import annotations

from typing import Any

import pytest
from django.conf import settings
from django.test import override_settings

from pinning_middleware import stores
from pinning_middleware.conf import DEFAULTS, conf
from tests.app.stores import RecordingStore
from tests.conftest import where

COOKIE = {"domain": None, "path": "/", "secure": False, "samesite": "Lax", "httponly": True}


def other_key(request: Any) -> str:
    return "other"


def classes() -> list[type]:
    return [type(store) for store in conf.stores]


# A setting, a value other than the default, the expression that reads it, and its result.
EFFECTS: list[tuple[str, Any, Any, Any]] = [
    ("PINNING_REPLICAS", ["replica2"], lambda: conf.replicas, {"default": {"replica2": 1}}),
    ("PINNING_SECONDS", 3, lambda: conf.seconds, 3.0),
    ("PINNING_POSITIONS", False, lambda: conf.positions, False),
    ("PINNING_WAIT", 0.05, lambda: conf.wait, 0.05),
    ("PINNING_STORES", ["tests.app.stores.RecordingStore"], classes, [RecordingStore]),
    ("PINNING_COOKIE_NAME", "other", lambda: conf.cookie_name, "other"),
    ("PINNING_COOKIE_DOMAIN", "a.b", lambda: conf.cookie, {**COOKIE, "domain": "a.b"}),
    ("PINNING_COOKIE_PATH", "/a", lambda: conf.cookie, {**COOKIE, "path": "/a"}),
    ("PINNING_COOKIE_SECURE", True, lambda: conf.cookie, {**COOKIE, "secure": True}),
    ("PINNING_COOKIE_SAMESITE", False, lambda: conf.cookie, {**COOKIE, "samesite": False}),
    ("PINNING_COOKIE_HTTPONLY", False, lambda: conf.cookie, {**COOKIE, "httponly": False}),
    ("PINNING_HEADER_NAME", "Other", lambda: conf.header_name, "Other"),
    ("PINNING_CACHE", "other", lambda: conf.cache, "other"),
    ("PINNING_USER_KEY", f"{__name__}.other_key", lambda: conf.key, other_key),
    ("PINNING_PRIMARY_METHODS", ["PUT"], lambda: conf.primary_methods, {"PUT"}),
    ("PINNING_BALANCE_BY", "query", lambda: conf.balance_by_query, True),
    ("PINNING_IGNORED_TABLES", ["T"], lambda: conf.ignored_tables, {"t"}),
    ("PINNING_MAX_LAG", 5, lambda: conf.max_lag, 5.0),
    ("PINNING_OFFLOAD", False, lambda: conf.offload, False),
    ("PINNING_OFFLOAD_OUTSIDE_REQUESTS", False, lambda: conf.offload_outside, False),
    (
        "PINNING_PRIMARY_MODELS",
        ["auth", "shop.Order"],
        lambda: conf.primary_models,
        frozenset({"auth", "shop.order"}),
    ),
    ("PINNING_RETRY_AFTER", 3, lambda: conf.retry_after, 3.0),
    ("PINNING_PRIMARY_DOWN", "stale", lambda: conf.primary_down, "stale"),
    ("PINNING_CONSISTENCY", "monotonic-reads", lambda: conf.monotonic_reads, True),
    (
        "PINNING_WRITING_FUNCTIONS",
        ["log_access", "audit.F"],
        lambda: conf.writing_functions,
        frozenset({"LOG_ACCESS", "F"}),
    ),
    ("PINNING_RETRY_404", True, lambda: conf.retry_404, 0.05),
    ("PINNING_RETRY_404", 0.5, lambda: conf.retry_404, 0.5),
    ("PINNING_DRY_RUN", {"default": 2}, lambda: conf.dry_run, {"default": 2.0}),
    ("PINNING_SESSION_SETUP", f"{__name__}.other_key", lambda: conf.session_setup, other_key),
    ("PINNING_ENABLED", False, lambda: conf.enabled, False),
    ("SESSION_COOKIE_NAME", "shop", lambda: conf.cookie_name, "shop-pinning"),
    ("SESSION_COOKIE_PATH", "/a", lambda: conf.cookie, {**COOKIE, "path": "/a"}),
    ("SESSION_COOKIE_SECURE", True, lambda: conf.cookie, {**COOKIE, "secure": True}),
    ("SESSION_COOKIE_HTTPONLY", False, lambda: conf.cookie, COOKIE),
    ("SLAVE_DATABASES", ["slave"], lambda: conf.slave_databases, ["slave"]),
]


@pytest.mark.parametrize(
    ("name", "value", "see", "seen"), EFFECTS, ids=[name for name, *_ in EFFECTS]
)
def test_changed_setting_takes_effect_and_is_dropped(
    name: str, value: Any, see: Any, seen: Any
) -> None:
    before = see()
    with override_settings(**{name: value}):
        assert see() == seen
        with override_settings(**{name: getattr(settings, name)}):
            assert see() == seen
    assert see() == before
    assert before != seen or name == "SESSION_COOKIE_HTTPONLY"


def test_every_setting_is_tested() -> None:
    assert {name for name, *_ in EFFECTS if name.startswith("PINNING_")} == set(DEFAULTS)


@pytest.mark.parametrize("name", sorted(set(DEFAULTS) - {"PINNING_REPLICAS"}))
def test_missing_setting_has_its_default(name: str) -> None:
    see = next(see for other, _, see, _ in EFFECTS if other == name)
    missing = see()
    with override_settings(**{name: DEFAULTS[name]}):
        assert see() == missing or name == "PINNING_STORES"


def test_setting_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request reads Django's settings."""
    with override_settings(PINNING_SECONDS=5), monkeypatch.context() as patch:
        assert conf.seconds == 5.0
        patch.delattr(type(conf), "_get")
        assert conf.seconds == 5.0


@pytest.mark.parametrize(
    ("value", "pools"),
    [
        ([], {}),
        (["a", "b"], {"default": {"a": 1, "b": 1}}),
        (("a",), {"default": {"a": 1}}),
        ({"users": ["a"]}, {"users": {"a": 1}}),
        ({"default": {"a": 3}, "users": []}, {"default": {"a": 3}, "users": {}}),
    ],
)
def test_forms_of_replicas(value: Any, pools: Any) -> None:
    with override_settings(PINNING_REPLICAS=value):
        assert conf.replicas == pools


@pytest.mark.parametrize("value", ["replica1", [["replica1"]], {"default": {"replica1": -1}}, 5])
def test_invalid_replicas_are_none_and_logged(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """If the check is silenced, all reads go to the primary."""
    with override_settings(PINNING_REPLICAS=value), caplog.at_level("ERROR", "pinning_middleware"):
        assert conf.replicas == {}
        assert where() == "default"
    assert caplog.messages
    assert caplog.messages[0].startswith("PINNING_REPLICAS should ")


def test_default_user_key() -> None:
    assert conf.key is stores.user_key


def test_cookie_name_of_the_site_does_not_follow_the_session_cookie() -> None:
    with override_settings(SESSION_COOKIE_NAME="shop", PINNING_COOKIE_NAME="pinning"):
        assert conf.cookie_name == "pinning"
