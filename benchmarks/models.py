from __future__ import annotations

from django.db import models


class Entry(models.Model):
    """The number that a client wrote last."""

    client = models.CharField(max_length=50, unique=True)
    number = models.IntegerField()

    objects = models.Manager["Entry"]()

    def __str__(self) -> str:
        return f"{self.client}: {self.number}"
