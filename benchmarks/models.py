from __future__ import annotations

from typing import ClassVar

from django.db import models


class Entry(models.Model):
    """The last number that a client wrote."""

    client = models.CharField(max_length=50, unique=True)
    number = models.IntegerField()

    objects: ClassVar[models.Manager[Entry]] = models.Manager()

    def __str__(self) -> str:
        return f"{self.client}: {self.number}"
