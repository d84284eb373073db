"""Filters of the panel's templates."""

from django import template

register = template.Library()


@register.filter
def role(alias: str) -> str:
    """Return the label of a database: `default` is not a meaningful name for users."""
    return "primary" if alias == "default" else alias
