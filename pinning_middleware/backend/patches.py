"""
Every change that the package makes to Django and to the drivers, in one table. Classes that
override `from_db()` or `close()` themselves are wrapped when they are first used, in `instances`
and `responses`; `connection` adds the mixin to the class of each connection.

Each row names the attribute that is replaced, why, the ticket if Django has one, and the test that
fails without it. The replacements are defined in the modules they belong to. The adapters
of task queues wrap hooks of their queue themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from pinning_middleware.backend import (
    async_connections,
    connection,
    cursor_methods,
    instances,
    orm,
    responses,
    view_transactions,
)
from pinning_middleware.servers import liveness, psycopg_pool

# Takes the original attribute and returns its replacement.
Wrap = Callable[[Any], Any]


class Patch(NamedTuple):
    """
    A replaced attribute.

    ``owner``: dotted path of its class or module; ``names``: the attributes; ``wrap``: makes the
    replacement of the original; ``app``: the app without which there is nothing to replace;
    ``is_optional``: whether the module, or the attribute, may be missing; ``is_new``: whether the
    attribute is added to the owner. ``wrap`` then takes its name.
    """

    owner: str
    names: tuple[str, ...]
    wrap: Wrap
    why: str
    test: str
    app: str = "django"
    ticket: str = ""
    is_optional: bool = False
    is_new: bool = False


PATCHES = (
    Patch(
        "django.db.utils.ConnectionHandler",
        ("create_connection",),
        connection.wrap_create_connection,
        "Gives each connection the mixin and the execute wrapper. connection_created is too late "
        "for a connection that cannot be opened.",
        "tests/real/test_failover.py",
    ),
    Patch(
        "django.db.backends.utils.CursorWrapper",
        ("callproc",),
        cursor_methods.record_callproc,
        "callproc() does not pass the execute wrappers.",
        "tests/test_writes.py",
        ticket="https://code.djangoproject.com/ticket/29190",
    ),
    Patch(
        "django.db.backends.utils.CursorWrapper",
        tuple(cursor_methods.STATEMENT_ARGUMENTS),
        cursor_methods.DriverMethod,
        "The driver's own methods do not pass the execute wrappers.",
        "tests/test_writes.py",
        is_new=True,
    ),
    Patch(
        "debug_toolbar.panels.sql.tracking.NormalCursorMixin",
        ("_record",),
        cursor_methods.open_before_recording,
        "django-debug-toolbar needs the driver's connection before the statement is run.",
        "tests/real/test_integrations.py",
        "debug_toolbar",
    ),
    Patch(
        "django_async_backend.db.utils.AsyncConnectionHandler",
        ("create_connection",),
        async_connections.wrap_create_connection,
        "Gives each async connection a mixin and an execute wrapper, as those of Django.",
        "tests/real/test_async_backend.py",
        "django_async_backend",
    ),
    Patch(
        "django.core.handlers.base.BaseHandler",
        ("make_view_atomic",),
        view_transactions.mark_view_transactions,
        "Distinguishes the transaction of ATOMIC_REQUESTS from those that the code opens.",
        "tests/test_scopes.py",
    ),
    Patch(
        "django.contrib.contenttypes.fields",
        ("create_generic_related_manager",),
        orm.route_writes,
        "A write through a GenericRelation calls db_for_read().",
        "tests/test_routers.py",
        "django.contrib.contenttypes",
        "https://code.djangoproject.com/ticket/36389",
    ),
    Patch(
        "django.db.models.base.Model",
        ("save_base",),
        instances.read_primary_while_saving,
        "What save() reads itself is part of the write.",
        "tests/backend/test_instances.py",
    ),
    Patch(
        "django.db.models.query_utils.DeferredAttribute",
        ("fetch_many",),
        instances.fetch_peers_by_route,
        "FETCH_PEERS of Django 6.1 calls no router for the database of a deferred field.",
        "tests/backend/test_instances.py",
        is_optional=True,
    ),
    Patch(
        "django.db.models.query.QuerySet",
        ("db",),
        orm.named_alias,
        "A read whose alias the code named follows no decision of the router.",
        "tests/backend/test_execute.py",
    ),
    Patch(
        "django.db.models.lookups.In",
        ("process_rhs",),
        orm.accept_pool_aliases,
        "The aliases of a pool are one database, also to a subquery.",
        "tests/backend/test_lookups.py",
    ),
    Patch(
        "django.template.response.SimpleTemplateResponse",
        ("render",),
        responses.render_in_context,
        "A template response is rendered under the rule of the decorator around its view.",
        "tests/test_api.py",
    ),
    Patch(
        "psycopg.Connection",
        ("wait",),
        liveness.watched_wait,
        "A read that waits for a server which no longer answers must fail over.",
        "tests/real/test_unresponsive.py",
        is_optional=True,
    ),
    Patch(
        "psycopg_pool.pool.ConnectionPool",
        ("getconn",),
        psycopg_pool.bounded_getconn,
        "A probe must not wait for a pooled connection as long as the site's own code may.",
        "tests/real/test_unresponsive.py",
        is_optional=True,
    ),
)


_is_installed = False


def install() -> None:
    """Apply every patch. Idempotent."""
    global _is_installed
    _is_installed = True
    for patch in PATCHES:
        if patch.app == "django" or apps.is_installed(patch.app):
            try:
                owner = _import(patch.owner)
            except ImportError:
                if patch.is_optional:
                    continue
                raise
            for name in patch.names:
                if patch.is_optional and not hasattr(owner, name):
                    continue
                replace(owner, name, patch.wrap, is_new=patch.is_new)
    # Classes that override these methods themselves.
    instances.install()
    connection.install()


def require_app(entry: str) -> None:
    """
    Raise ImproperlyConfigured if the app is not installed: writes would not be detected.

    ``entry`` is the name of the class that needs it. A test that removes the app from
    INSTALLED_APPS, or limits the apps by ``available_apps``, does not undo ``install()``.
    """
    if apps.apps_ready and not (_is_installed or apps.is_installed("pinning_middleware")):
        raise ImproperlyConfigured(f"{entry} requires 'pinning_middleware' in INSTALLED_APPS.")


def _import(path: str) -> Any:
    """Import a class or a module."""
    try:
        return import_string(path)
    except ImportError:
        return import_module(path)


def replace(owner: Any, name: str, wrap: Wrap, *, is_new: bool = False) -> None:
    """
    Replace an attribute by what ``wrap`` makes of it, unless that has been done. Raise
    AttributeError if it is missing and is not to be added (``is_new``).
    """
    if hasattr(vars(owner).get(name), "pinning_original"):
        return
    original = None if is_new else getattr(owner, name)
    replacement: Any = wrap(name if is_new else original)
    if original is not None:
        functools.update_wrapper(replacement, original)
    replacement.pinning_original = original
    setattr(owner, name, replacement)
