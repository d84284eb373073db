"""Checks of each setting: an error with an ID and a hint for every invalid value."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage
from django.db import DEFAULT_DB_ALIAS, router
from django.utils.module_loading import import_string

from pinning_middleware.checks.messages import check, error, warning
from pinning_middleware.conf import DEFAULTS, conf
from pinning_middleware.pool_specs import PoolSpec, parse_dry_run, parse_pools
from pinning_middleware.routers import PinningRouter
from pinning_middleware.stores import BaseStore

# The rotation has as many entries as the weights have together.
_MAX_WEIGHT: Final = 1000
_HTTP_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FUNCTION_NAME: Final = re.compile(r"(?:[A-Za-z_][\w$]*\.)?[A-Za-z_][\w$]*")


def value_of(name: str) -> Any:
    """Return the value in the site's settings, also under a name of `MULTIDB_ALIASES`."""
    return getattr(settings, conf.effective_name(name), DEFAULTS.get(name))


# Predicates


def is_seconds(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= 0
    )


def is_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(
        isinstance(part, str) and part for part in value
    )


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_share(value: Any) -> bool:
    return is_bool(value) or (is_seconds(value) and 0 < value <= 1)


def is_one_of(*choices: Any) -> Callable[[Any], bool]:
    # By type as well, since 1 == True.
    return lambda value: any(type(value) is type(c) and value == c for c in choices)


def is_http_token(value: Any) -> bool:
    return isinstance(value, str) and _HTTP_TOKEN.fullmatch(value) is not None


def is_function_path(value: Any) -> bool:
    return isinstance(value, str) and callable(imported(value)[0])


def imported(path: str) -> tuple[Any, str]:
    """Import a dotted path; return it, or None and the error."""
    try:
        return import_string(path), ""
    # A path that begins with a dot raises the latter two.
    except (ImportError, TypeError, ValueError) as error:
        return None, str(error)


def or_none(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


class Rule(NamedTuple):
    """What a setting should be."""

    setting: str
    number: str
    is_valid: Callable[[Any], bool]
    requirement: str  # completes "PINNING_… should be …"
    hint: str


_SECONDS_HINT = "Set a number, for example 15 or 0.05."
_BOOL_HINT = "Convert a string from the environment: 'False' is true."
_COOKIE_HINT = "Remove it to use the value of SESSION_COOKIE_{}."
RULES: Final = (
    *(
        Rule(name, "E005", is_seconds, "a number of seconds, 0 or more", _SECONDS_HINT)
        for name in ("PINNING_SECONDS", "PINNING_WAIT", "PINNING_RETRY_AFTER")
    ),
    Rule(
        "PINNING_MAX_LAG",
        "E005",
        or_none(is_seconds),
        "a number of seconds, 0 or more, or None",
        _SECONDS_HINT,
    ),
    *(
        Rule(name, "E006", is_bool, "True or False", _BOOL_HINT)
        for name in (
            *("PINNING_ENABLED", "PINNING_OFFLOAD_OUTSIDE_REQUESTS", "PINNING_COOKIE_HTTPONLY"),
        )
    ),
    *(
        Rule(
            name,
            "E007",
            is_one_of(*choices),
            f"one of {', '.join(map(repr, choices))}",
            f"Set one of them; the default is {DEFAULTS[name]!r}.",
        )
        for name, choices in {
            "PINNING_BALANCE_BY": ("request", "query", "user"),
            "PINNING_PRIMARY_DOWN": ("error", "stale"),
            "PINNING_CONSISTENCY": ("read-your-writes", "monotonic-reads"),
        }.items()
    ),
    Rule(
        "PINNING_COOKIE_NAME",
        "E009",
        is_http_token,
        "a valid name of a cookie",
        "Set letters, digits, hyphens and underscores only.",
    ),
    Rule(
        "PINNING_HEADER_NAME",
        "E009",
        lambda value: is_http_token(value) and "_" not in value,
        "a valid name of an HTTP header without underscores",
        "Set letters, digits and hyphens only: servers drop headers with an underscore.",
    ),
    Rule(
        "PINNING_COOKIE_DOMAIN",
        "E010",
        or_none(lambda value: isinstance(value, str)),
        "a string",
        _COOKIE_HINT.format("DOMAIN"),
    ),
    Rule(
        "PINNING_COOKIE_PATH",
        "E010",
        or_none(lambda value: isinstance(value, str) and value.startswith("/")),
        "a string that begins with a slash",
        f"Browsers replace any other by the path of the page. {_COOKIE_HINT.format('PATH')}",
    ),
    Rule(
        "PINNING_COOKIE_SECURE",
        "E010",
        or_none(is_bool),
        "True or False",
        _COOKIE_HINT.format("SECURE"),
    ),
    Rule(
        "PINNING_COOKIE_SAMESITE",
        "E010",
        lambda value: value in (None, False) or str(value).lower() in ("lax", "strict", "none"),
        "'Lax', 'Strict', 'None' or False",
        _COOKIE_HINT.format("SAMESITE"),
    ),
    Rule(
        "PINNING_CACHE",
        "E011",
        lambda value: isinstance(value, str) and value in settings.CACHES,
        "an alias of CACHES",
        "Set an alias of CACHES, or add this one to CACHES.",
    ),
    Rule(
        "PINNING_USER_KEY",
        "E012",
        is_function_path,
        "the dotted path of a function key(request) -> str or None",
        f"Set the path of a function; the default is {DEFAULTS['PINNING_USER_KEY']!r}.",
    ),
    Rule(
        "PINNING_PRIMARY_METHODS",
        "E013",
        lambda value: is_strings(value) and all(method == method.upper() for method in value),
        "a list of HTTP methods in upper case",
        'Set a list such as ("POST", "PUT", "PATCH", "DELETE"), or () for none.',
    ),
    Rule(
        "PINNING_IGNORED_TABLES",
        "E014",
        is_strings,
        "a list of table names",
        'Set a list such as ("shop_hits",): tables whose rows no user reads back.',
    ),
    Rule(
        "PINNING_POSITIONS",
        "E015",
        is_one_of(True, False, "lsn", "gtid", "xid"),
        "True, False, 'lsn', 'gtid' or 'xid'",
        "Set True for the best method of the database.",
    ),
    Rule(
        "PINNING_OFFLOAD",
        "E016",
        lambda value: is_bool(value) or is_function_path(value),
        "True, False or the dotted path of a function offload(request) -> bool",
        "Set False if only what is decorated with `offload` may read replicas.",
    ),
    Rule(
        "PINNING_PRIMARY_MODELS",
        "E017",
        is_strings,
        "a list of app labels and model labels",
        'Set a list such as ("auth", "shop.Order").',
    ),
    Rule(
        "PINNING_RETRY_404",
        "E026",
        is_share,
        "True, False or a number above 0 and at most 1",
        "Set True, or the share of requests that may be run again, for example 0.05 for 5 %.",
    ),
    Rule(
        "PINNING_WRITING_FUNCTIONS",
        "E022",
        lambda value: is_strings(value) and all(map(_FUNCTION_NAME.fullmatch, value)),
        "a list of names of database functions",
        'Set a list such as ("log_access", "audit.log_access"), without parentheses.',
    ),
    Rule(
        "PINNING_SESSION_SETUP",
        "E023",
        or_none(is_function_path),
        "None or the dotted path of a function setup(connection)",
        "Set the path of a function that sets up a connection's session.",
    ),
)


@check
def check_values() -> list[CheckMessage]:
    return [
        error(
            rule.number,
            f"{conf.effective_name(rule.setting)} should be {rule.requirement}, "
            f"not {value!r}{_import_error(rule, value)}.",
            rule.hint,
        )
        for rule in RULES
        if not rule.is_valid(value := value_of(rule.setting))
    ]


def _import_error(rule: Rule, value: Any) -> str:
    """Return the error of importing a dotted path, in parentheses, or an empty string."""
    if "dotted path" not in rule.requirement or not isinstance(value, str):
        return ""
    _, problem = imported(value)
    return f" ({problem})" if problem else ""


@check
def check_replicas() -> Iterator[CheckMessage]:
    value, name = value_of("PINNING_REPLICAS"), conf.effective_name("PINNING_REPLICAS")
    try:
        specs = parse_pools(value)
    except ValueError as problem:
        yield error(
            "E001",
            f"{name} {problem}, not {value!r}.",
            'Set ["replica1", "replica2"] for one primary, or '
            '{"default": ["replica1"], "users": {"users_replica": 2}} for several.',
        )
        return
    pools = {spec.key.primary: dict(spec.weights) for spec in specs}
    yield from _check_aliases(name, pools)
    yield from _check_places(name, pools)
    yield from _check_weights(name, pools)
    yield from _check_groups(name, specs)


def _check_aliases(name: str, pools: dict[str, dict[str, int]]) -> Iterator[CheckMessage]:
    for alias in dict.fromkeys(alias for pool in pools.items() for alias in (pool[0], *pool[1])):
        if alias not in settings.DATABASES:
            yield error(
                "E002",
                f"{name} contains {alias!r}, which is not an alias of DATABASES.",
                _did_you_mean(alias, list(settings.DATABASES), "Set aliases of DATABASES."),
            )


def _check_places(name: str, pools: dict[str, dict[str, int]]) -> Iterator[CheckMessage]:
    seen: set[str] = set()
    for primary, weights in pools.items():
        for alias in weights:
            if alias == primary:
                problem = f"lists {alias!r} as a replica of itself"
            elif alias in pools:
                problem = f"lists {alias!r} as a primary and as a replica of {primary!r}"
            elif alias in seen:
                problem = f"lists {alias!r} as a replica of more than one primary"
            else:
                problem = ""
            if problem:
                hint = (
                    "Set each alias once: a replica has one primary, and is not itself a primary."
                )
                yield error("E003", f"{name} {problem}.", hint)
            seen.add(alias)


def _check_weights(name: str, pools: dict[str, dict[str, int]]) -> Iterator[CheckMessage]:
    for weights in pools.values():
        divisor = math.gcd(*weights.values()) or 1
        for alias, weight in weights.items():
            if weight // divisor > _MAX_WEIGHT:
                yield error(
                    "E021",
                    f"{name} has the weight {weight} for {alias!r}, which is above {_MAX_WEIGHT} "
                    "in lowest terms.",
                    "Set smaller weights: only their ratio counts, for example 2 and 1 in place of "
                    "2003 and 1001.",
                )


def _check_groups(name: str, specs: tuple[PoolSpec, ...]) -> Iterator[CheckMessage]:
    for spec in specs:
        if any(spec.weights.values()) and not any(spec.weights_of(None).values()):
            yield warning(
                "W030",
                f"{name} has no replica of {spec.key.primary!r} without groups and with a weight "
                "above 0, so every read outside use_replica(group=…) goes to the primary.",
                "Remove the groups of a replica, or add one without groups. Ignore this warning "
                "if only reads of groups should leave the primary.",
            )
        for group in spec.groups:
            if any(spec.weights.values()) and not any(spec.weights_of(group).values()):
                yield warning(
                    "W031",
                    f"{name} has no replica with a weight above 0 in the group {group!r} of "
                    f"{spec.key.primary!r}, so its reads go to the replicas without groups.",
                    "Set the weight of a replica of this group.",
                )


@check
def check_dry_run() -> Iterator[CheckMessage]:
    value = value_of("PINNING_DRY_RUN")
    example = 'Set {"default": 2}: the alias of a primary, and the lag of its replicas in seconds'
    try:
        lags = parse_dry_run(value)
    except ValueError as problem:
        yield error("E027", f"PINNING_DRY_RUN {problem}, not {value!r}.", f"{example}; or None.")
        return
    legacy, replicas = getattr(settings, "SLAVE_DATABASES", None), conf.readonly_aliases
    primaries = {alias: "PINNING_REPLICAS" for alias, weights in conf.replicas.items() if weights}
    if is_strings(legacy) and legacy:
        primaries.setdefault(DEFAULT_DB_ALIAS, "SLAVE_DATABASES")
    for alias in lags:
        if alias not in settings.DATABASES:
            known = [each for each in settings.DATABASES if each not in replicas]
            message = f"PINNING_DRY_RUN contains {alias!r}, which is not an alias of DATABASES."
            yield error("E027", message, _did_you_mean(alias, known, f"{example}."))
        elif alias in replicas:
            message = f"PINNING_DRY_RUN contains {alias!r}, which is a replica."
            yield error("E027", message, f"{example}.")
        elif alias in primaries:
            yield error(
                "E027",
                f"PINNING_DRY_RUN contains {alias!r}, which has replicas in "
                f"{conf.effective_name(primaries[alias])}, so there is no dry run.",
                f"Remove {alias!r} from PINNING_DRY_RUN, or its replicas.",
            )
    yield from _check_assumed_lags(lags)


def _check_assumed_lags(lags: dict[str, float]) -> Iterator[CheckMessage]:
    seconds = value_of("PINNING_SECONDS")
    for alias, lag in lags.items():
        if is_seconds(seconds) and lag > seconds:
            yield warning(
                "W032",
                f"PINNING_DRY_RUN assumes a lag of {lag:g} s for {alias!r}, and pins without a "
                f"position end after {seconds:g} s (PINNING_SECONDS), so clients would miss their "
                "own writes.",
                f"Set a lag of at most {seconds:g}, or a larger PINNING_SECONDS.",
            )


@check
def check_default_is_writable() -> Iterator[CheckMessage]:
    """Every model without another primary is written to `default`."""
    primary = conf.readonly_aliases.get(DEFAULT_DB_ALIAS)
    if primary is None or DEFAULT_DB_ALIAS in conf.replicas:
        return
    own = PinningRouter.db_for_write
    if any(getattr(type(other), "db_for_write", own) is not own for other in router.routers):
        return
    yield error(
        "E024",
        f"{conf.effective_name('PINNING_REPLICAS')} lists {DEFAULT_DB_ALIAS!r} as a replica of "
        f"{primary!r}, and no router returns another database for writes, so every write of a "
        "model is rejected.",
        f"Set {DEFAULT_DB_ALIAS!r} as the primary, or add a router after PinningRouter whose "
        f"db_for_write() returns {primary!r}.",
    )


@check
def check_slave_databases() -> Iterator[CheckMessage]:
    value = getattr(settings, "SLAVE_DATABASES", None)
    is_replicas = conf.effective_name("PINNING_REPLICAS") == "SLAVE_DATABASES"
    if value is None or (is_replicas and not isinstance(value, Mapping)):
        # In the latter case it is checked as PINNING_REPLICAS.
        return
    hint = "Set a list of aliases of DATABASES: the replicas of the legacy interface."
    if not is_strings(value):
        message = f"SLAVE_DATABASES should be a list of aliases, not {value!r}."
        yield error("E004", message, hint)
        return
    for alias in value:
        if alias not in settings.DATABASES:
            message = f"SLAVE_DATABASES contains {alias!r}, which is not an alias of DATABASES."
            yield error("E004", message, hint)


@check
def check_stores() -> Iterator[CheckMessage]:
    paths = value_of("PINNING_STORES")
    hint = (
        "Set dotted paths of classes derived from pinning_middleware.stores.BaseStore; the default "
        f"is {DEFAULTS['PINNING_STORES']!r}."
    )
    if not isinstance(paths, (list, tuple)) or not is_strings(paths):
        message = f"PINNING_STORES should be a list of dotted paths of classes, not {paths!r}."
        yield error("E008", message, hint)
        return
    for path in paths:
        if problem := _problem_of_store(path):
            yield error("E008", f"PINNING_STORES contains {path!r}, which {problem}.", hint)


def _problem_of_store(path: str) -> str:
    store, problem = imported(path)
    if problem:
        return f"cannot be imported ({problem})"
    if not isinstance(store, type):
        return "is not a class"
    if missing := _missing_methods(store):
        return f"does not provide {', '.join(missing)}"
    return ""


def _missing_methods(store: type) -> list[str]:
    methods = ("load", "save", "aload", "asave", "after_authentication")
    return [method for method in methods if not hasattr(store, method)] or [
        method
        for method in ("load", "save")
        # A store may provide only the async method.
        if all(getattr(store, m) is getattr(BaseStore, m) for m in (method, f"a{method}"))
    ]


@check
def check_primary_models() -> Iterator[CheckMessage]:
    labels = value_of("PINNING_PRIMARY_MODELS")
    if not is_strings(labels):
        return
    known = [config.label for config in apps.get_app_configs()]
    known += [model._meta.label for model in apps.get_models(include_auto_created=True)]
    lower = {label.lower() for label in known}
    for label in labels:
        if label.lower() not in lower:
            yield error(
                "E018",
                f"PINNING_PRIMARY_MODELS contains {label!r}, which is not the label of an "
                "installed app or model.",
                _did_you_mean(label, known, 'Set labels such as "auth" or "shop.Order".'),
            )


@check
def check_unknown_settings() -> list[CheckMessage]:
    return [
        warning(
            "W001",
            f"{name} is not a setting of pinning_middleware.",
            _did_you_mean(name, list(DEFAULTS), f"Set one of {', '.join(DEFAULTS)}."),
        )
        for name in dir(settings)
        if name.startswith("PINNING_") and name not in DEFAULTS
    ]


def _did_you_mean(name: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]}?" if near else otherwise
