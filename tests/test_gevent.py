"""Greenlets of gevent; in a process of its own, since its monkey patches are for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gevent")

SCRIPT = """
from gevent import monkey
monkey.patch_all()

import django
django.setup()

import gevent
from pinning_middleware import pinning_scope, propagate_scope, is_pinned, pin_this_request

def found(function):
    return gevent.spawn(function).get(timeout=30)

with pinning_scope():
    pin_this_request()
    print(is_pinned(), found(is_pinned), found(propagate_scope(is_pinned)))
with pinning_scope() as scope:
    found(propagate_scope(pin_this_request))
    print(is_pinned(), scope.token is not None)
print(found(is_pinned))
"""


def test_greenlet_has_the_scope_only_by_propagate_scope() -> None:
    environ = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[1],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split("\n")[:3] == ["True False True", "True True", "False"], done.stderr
