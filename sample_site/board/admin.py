"""The board in Django's admin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.contrib import admin

from .models import Message

if TYPE_CHECKING:
    _MessageAdmin = admin.ModelAdmin[Message]
else:
    _MessageAdmin = admin.ModelAdmin


@admin.register(Message)
class MessageAdmin(_MessageAdmin):
    """Messages, newest first."""

    list_display = ("text", "author", "created")
    list_select_related = ("author",)
    search_fields = ("text",)
