from django.apps import AppConfig


class PanelConfig(AppConfig):
    """The panel at the foot of every page: who answered, who is pinned, how far replicas are."""

    name = "sample_site.panel"
