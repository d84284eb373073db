"""Models of the board."""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings
from django.db import models


class Message(models.Model):
    """A message on the board."""

    author = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE)
    text = models.CharField(max_length=280)
    created = models.DateTimeField(auto_now_add=True)

    objects: ClassVar[models.Manager[Message]]

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return self.text
