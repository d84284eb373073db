from __future__ import annotations

from django.apps import AppConfig


class SoakConfig(AppConfig):
    name = "tests.soak"
    label = "soak"
