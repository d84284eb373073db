"""Every setting by itself: an error with an id and a hint for each bad value."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage, Error, register
from django.utils.module_loading import import_string

from pinning_middleware.conf import DEFAULTS, OLDER, conf, parse_replicas
from pinning_middleware.stores import BaseStore

__all__ = ["TAG", "spelled", "value_of"]

TAG = "pinning"
CHOICES = {
    "PINNING_BALANCE_BY": ("request", "query"),
    "PINNING_PRIMARY_DOWN": ("error", "stale"),
    "PINNING_CONSISTENCY": ("read-your-writes", "monotonic-reads"),
}
_SAMESITE = ("lax", "strict", "none")
# A round of turns is kept, and has as many as the weights together.
_HEAVIEST = 1000
_HTTP_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


def spelled(name: str) -> str:
    """Return the name by which this site sets it: ours, or one of ``OLDER`` that is read."""
    if name in OLDER and conf.reads_older and not hasattr(settings, name):
        return next((older for older in OLDER[name] if hasattr(settings, older)), name)
    return name


def value_of(name: str) -> Any:
    """Return what the site says by that name, or by the older one that is read instead."""
    return getattr(settings, spelled(name), DEFAULTS.get(name))


def _error(number: int, name: str, says: str, hint: str) -> Error:
    return Error(
        f"{spelled(name)} {says}, not {value_of(name)!r}.",
        hint=hint,
        id=f"pinning_middleware.E{number:03}",
    )


def _judge(
    number: int, names: Iterable[str], good: Callable[[Any], bool], says: str, hint: str
) -> list[CheckMessage]:
    return [_error(number, name, says, hint) for name in names if not good(value_of(name))]


def _is_seconds(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= 0
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(
        isinstance(part, str) and part for part in value
    )


@register(TAG)
def check_replicas(**kwargs: Any) -> list[CheckMessage]:
    try:
        pools = parse_replicas(value_of("PINNING_REPLICAS"))
    except ValueError as error:
        return [
            Error(
                f"{spelled('PINNING_REPLICAS')}: {error}, not {value_of('PINNING_REPLICAS')!r}.",
                hint='For one primary: ["replica1", "replica2"]. For several: '
                '{"default": ["replica1"], "users": {"users_replica": 2}}.',
                id="pinning_middleware.E001",
            )
        ]
    found: list[CheckMessage] = []
    seen: set[str] = set(pools)
    for primary, weights in pools.items():
        found += [
            _error(
                2,
                "PINNING_REPLICAS",
                f"names {alias!r}, which DATABASES does not have",
                "Use the aliases of DATABASES.",
            )
            for alias in (primary, *weights)
            if alias not in settings.DATABASES
        ]
        divisor = math.gcd(*weights.values()) or 1
        found += [
            _error(
                21,
                "PINNING_REPLICAS",
                f"gives {alias!r} the weight {weight}, which is above {_HEAVIEST} in lowest terms",
                "Only the ratio of weights counts: give 2 and 1, say, for 2003 and 1001.",
            )
            for alias, weight in weights.items()
            if weight // divisor > _HEAVIEST
        ]
        for alias in weights:
            if alias in seen:
                found.append(
                    _error(
                        3,
                        "PINNING_REPLICAS",
                        f"gives {alias!r} two places",
                        "A replica has one primary, and is not a primary itself.",
                    )
                )
            seen.add(alias)
    return found


@register(TAG)
def check_slave_databases(**kwargs: Any) -> list[CheckMessage]:
    value = getattr(settings, "SLAVE_DATABASES", None)
    if value is None:
        return []
    if spelled("PINNING_REPLICAS") == "SLAVE_DATABASES" and not isinstance(value, Mapping):
        # Read as PINNING_REPLICAS, and judged with it.
        return []
    hint = "It is the older interface's list of replicas; use the aliases of DATABASES."
    if not _is_texts(value):
        return [_error_of_older("must be a list of aliases", value, hint)]
    return [
        _error_of_older(f"names {alias!r}, which DATABASES does not have", value, hint)
        for alias in value
        if alias not in settings.DATABASES
    ]


def _error_of_older(says: str, value: object, hint: str) -> Error:
    return Error(f"SLAVE_DATABASES {says}, not {value!r}.", hint=hint, id="pinning_middleware.E004")


@register(TAG)
def check_seconds(**kwargs: Any) -> list[CheckMessage]:
    names = ("PINNING_SECONDS", "PINNING_WAIT", "PINNING_RETRY_AFTER")
    hint = "Give it in seconds, for example 15 or 0.05."
    says = "must be a number of seconds, 0 or more"
    return _judge(5, names, _is_seconds, says, hint) + _judge(
        5,
        ("PINNING_MAX_LAG",),
        lambda value: value is None or _is_seconds(value),
        f"{says}, or None",
        hint,
    )


@register(TAG)
def check_switches(**kwargs: Any) -> list[CheckMessage]:
    names = ("PINNING_ENABLED", "PINNING_OFFLOAD_OUTSIDE_REQUESTS", "PINNING_COOKIE_HTTPONLY")
    return _judge(
        6,
        names,
        lambda value: isinstance(value, bool),
        "must be True or False",
        "A text such as 'False' counts as true; convert it where it is read from the environment.",
    )


@register(TAG)
def check_choices(**kwargs: Any) -> list[CheckMessage]:
    return [
        _error(
            7,
            name,
            f"must be one of {', '.join(map(repr, choices))}",
            f"The default is {DEFAULTS[name]!r}.",
        )
        for name, choices in CHOICES.items()
        if value_of(name) not in choices
    ]


@register(TAG)
def check_stores(**kwargs: Any) -> list[CheckMessage]:
    hint = f"The default is {DEFAULTS['PINNING_STORES']!r}; see “Stores” in the documentation."
    paths = value_of("PINNING_STORES")
    if not isinstance(paths, (list, tuple)) or not _is_texts(paths):
        return [_error(8, "PINNING_STORES", "must be a list of dotted paths of classes", hint)]
    found: list[CheckMessage] = []
    for path in paths:
        try:
            store = import_string(path)
        except ImportError as error:
            found.append(_error(8, "PINNING_STORES", f"has {path!r} ({error})", hint))
            continue
        if not isinstance(store, type):
            found.append(_error(8, "PINNING_STORES", f"has {path!r}, which is no class", hint))
        elif missing := _missing(store):
            lacks = f"has {path!r}, which lacks {', '.join(missing)}"
            found.append(
                _error(
                    8,
                    "PINNING_STORES",
                    lacks,
                    "Derive it from pinning_middleware.stores.BaseStore.",
                )
            )
    return found


def _missing(store: type) -> list[str]:
    methods = ("load", "save", "aload", "asave", "after_authentication")
    return [method for method in methods if not hasattr(store, method)] or [
        method
        for method in ("load", "save")
        # The async twin does without it only where it is the store's own.
        if all(getattr(store, m) is getattr(BaseStore, m) for m in (method, f"a{method}"))
    ]


@register(TAG)
def check_names(**kwargs: Any) -> list[CheckMessage]:
    return [
        *_judge(
            9,
            ("PINNING_COOKIE_NAME",),
            _is_http_token,
            "must be a name that HTTP allows",
            "Use letters, digits, hyphens and underscores.",
        ),
        *_judge(
            9,
            ("PINNING_HEADER_NAME",),
            lambda value: _is_http_token(value) and "_" not in value,
            "must be a name that HTTP allows, without underscores",
            "Use letters, digits and hyphens: servers drop headers with an underscore.",
        ),
    ]


def _is_http_token(value: Any) -> bool:
    return isinstance(value, str) and _HTTP_TOKEN.fullmatch(value) is not None


@register(TAG)
def check_cookie(**kwargs: Any) -> list[CheckMessage]:
    hint = "Leave it out to use that of SESSION_COOKIE_…."
    return [
        *_judge(
            10,
            ("PINNING_COOKIE_DOMAIN",),
            lambda value: value is None or isinstance(value, str),
            "must be text",
            hint,
        ),
        *_judge(
            10,
            ("PINNING_COOKIE_PATH",),
            lambda value: value is None or (isinstance(value, str) and value.startswith("/")),
            "must be text that begins with a slash",
            f"Browsers take any other for the path of the page. {hint}",
        ),
        *_judge(
            10,
            ("PINNING_COOKIE_SECURE",),
            lambda value: value is None or isinstance(value, bool),
            "must be True or False",
            hint,
        ),
        *_judge(
            10,
            ("PINNING_COOKIE_SAMESITE",),
            lambda value: value in (None, False) or str(value).lower() in _SAMESITE,
            "must be 'Lax', 'Strict', 'None' or False",
            hint,
        ),
    ]


@register(TAG)
def check_cache(**kwargs: Any) -> list[CheckMessage]:
    return _judge(
        11,
        ("PINNING_CACHE",),
        lambda value: isinstance(value, str) and value in settings.CACHES,
        "must be an alias of CACHES",
        f"CACHES has {', '.join(map(repr, settings.CACHES))}.",
    )


@register(TAG)
def check_key(**kwargs: Any) -> list[CheckMessage]:
    return _judge(
        12,
        ("PINNING_USER_KEY",),
        _is_path_of_callable,
        "must be the dotted path of a function key(request) -> str or None",
        f"The default is {DEFAULTS['PINNING_USER_KEY']!r}, the logged-in user's id.",
    )


def _is_path_of_callable(value: Any) -> bool:
    try:
        return isinstance(value, str) and callable(import_string(value))
    except ImportError:
        return False


@register(TAG)
def check_methods(**kwargs: Any) -> list[CheckMessage]:
    return _judge(
        13,
        ("PINNING_PRIMARY_METHODS",),
        lambda value: _is_texts(value) and all(method == method.upper() for method in value),
        "must be a list of HTTP methods in capitals",
        'For example ("POST", "PUT", "PATCH", "DELETE"), or () for none.',
    )


@register(TAG)
def check_ignored_tables(**kwargs: Any) -> list[CheckMessage]:
    return _judge(
        14,
        ("PINNING_IGNORED_TABLES",),
        _is_texts,
        "must be a list of names of tables",
        'For example ("shop_hits",), whose rows no user reads back.',
    )


@register(TAG)
def check_positions(**kwargs: Any) -> list[CheckMessage]:
    return _judge(
        15,
        ("PINNING_POSITIONS",),
        lambda value: isinstance(value, bool) or value in ("lsn", "gtid", "xid"),
        "must be True, False, 'lsn', 'gtid' or 'xid'",
        "True takes the best way that the database has.",
    )


@register(TAG)
def check_offload(**kwargs: Any) -> list[CheckMessage]:
    return _judge(
        16,
        ("PINNING_OFFLOAD",),
        lambda value: isinstance(value, bool) or _is_path_of_callable(value),
        "must be True, False or the dotted path of a function offload(request) -> bool",
        "False lets only what `offload` marks read replicas.",
    )


@register(TAG)
def check_primary_models(**kwargs: Any) -> list[CheckMessage]:
    hint = 'For example ("auth", "shop.Order"): labels of apps, or of models.'
    labels = value_of("PINNING_PRIMARY_MODELS")
    if not _is_texts(labels):
        return [_error(17, "PINNING_PRIMARY_MODELS", "must be a list of labels", hint)]
    known = [config.label for config in apps.get_app_configs()]
    known += [model._meta.label for model in apps.get_models()]
    lower = {label.lower() for label in known}
    found: list[CheckMessage] = []
    for label in labels:
        if label.lower() not in lower:
            near = difflib.get_close_matches(label, known, n=1)
            says = f"has {label!r}, which is the label of no app and no model"
            found.append(
                _error(
                    18,
                    "PINNING_PRIMARY_MODELS",
                    says,
                    f"Did you mean {near[0]!r}?" if near else hint,
                )
            )
    return found


@register(TAG)
def check_unknown_settings(**kwargs: Any) -> list[CheckMessage]:
    return [
        checks.Warning(
            f"{name} is not a setting of pinning_middleware.",
            hint=_did_you_mean(name),
            id="pinning_middleware.W001",
        )
        for name in dir(settings)
        if name.startswith("PINNING_") and name not in DEFAULTS
    ]


def _did_you_mean(name: str) -> str:
    near = difflib.get_close_matches(name, DEFAULTS, n=1)
    return f"Did you mean {near[0]}?" if near else f"Known are {', '.join(DEFAULTS)}."
