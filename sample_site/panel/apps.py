from django.apps import AppConfig


class PanelConfig(AppConfig):
    """The panel on every page: databases of reads, pins, and positions of replicas."""

    name = "sample_site.panel"
