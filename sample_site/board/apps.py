from django.apps import AppConfig


class BoardConfig(AppConfig):
    """The message board."""

    name = "sample_site.board"
