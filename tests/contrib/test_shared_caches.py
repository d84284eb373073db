"""What packages cache for all users, after a write that the replicas do not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.db import connections
from django.test import override_settings

from pinning_middleware import pinning_scope
from tests.conftest import REPLICAS, change_behind

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@contextmanager
def installed(settings: Any, app: str, *names: str) -> Iterator[None]:
    """Install an app, and create the tables of these models on all servers."""
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, app]
    apps.clear_cache()
    models = [apps.get_model(name) for name in names]
    tables = [model._meta.db_table for model in models]
    with connections["default"].schema_editor() as editor:
        for model in models:
            editor.create_model(model)
    with connections["default"].cursor() as cursor:
        created = cursor.execute(
            f"SELECT sql FROM sqlite_master WHERE name IN ({', '.join(map(repr, tables))})"
        ).fetchall()
    for alias, (sql,) in product(REPLICAS, created):
        change_behind(alias, sql)
    try:
        yield
    finally:
        for alias, table in product(("default", *REPLICAS), tables):
            change_behind(alias, f"DROP TABLE {table}")
        settings.INSTALLED_APPS = settings.INSTALLED_APPS[:-1]
        apps.clear_cache()


def as_another(function: Callable[[], Any]) -> Any:
    """Run a function as another request does."""
    with pinning_scope(isolated=True):
        return function()


def test_site_is_refilled_with_the_old_domain_unless_it_is_a_primary_model(settings: Any) -> None:
    settings.SITE_ID = 1
    with installed(settings, "django.contrib.sites", "sites.Site"):
        from django.contrib.sites.models import Site

        for alias in ("default", *REPLICAS):
            change_behind(alias, "INSERT INTO django_site (id, domain, name) VALUES (1, 'old', '')")

        def domain_after_write() -> str:
            as_another(lambda: Site(pk=1, domain="new", name="new").save())
            return str(as_another(lambda: Site.objects.get_current().domain))

        assert domain_after_write() == "old"
        with override_settings(PINNING_PRIMARY_MODELS=["sites"]):
            assert domain_after_write() == "new"


def test_switch_is_refilled_with_the_old_value_unless_it_is_a_primary_model(settings: Any) -> None:
    with installed(settings, "waffle", "waffle.Switch"):
        import waffle
        from waffle.models import Switch

        def is_active_after_write() -> bool:
            as_another(
                lambda: Switch.objects.update_or_create(name="new", defaults={"active": True})
            )
            as_another(
                lambda: Switch.objects.using("default").get(name="new").save(using="default")
            )
            return bool(as_another(lambda: waffle.switch_is_active("new")))

        assert not is_active_after_write()
        with override_settings(PINNING_PRIMARY_MODELS=["waffle"]):
            assert is_active_after_write()


def test_constance_is_refilled_with_the_old_value_unless_it_is_a_primary_model(
    settings: Any, tmp_path: Path
) -> None:
    settings.CACHES = {
        **settings.CACHES,
        "files": {"BACKEND": "django.core.cache.backends.filebased.FileBasedCache"}
        | {"LOCATION": str(tmp_path)},
    }
    with installed(settings, "constance", "constance.Constance"):
        import constance.settings
        from constance.backends.database import DatabaseBackend

        constance.settings.DATABASE_CACHE_BACKEND = "files"
        constance.settings.DATABASE_CACHE_AUTOFILL_TIMEOUT = None
        try:
            backend = DatabaseBackend()
        finally:
            constance.settings.DATABASE_CACHE_BACKEND = None

        def value_after_write(value: str) -> Any:
            as_another(lambda: backend.set("THEME", value))
            backend._cache.clear()
            return as_another(lambda: backend.get("THEME"))

        assert value_after_write("dark") is None
        with override_settings(PINNING_PRIMARY_MODELS=["constance"]):
            assert value_after_write("light") == "light"
