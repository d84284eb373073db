from __future__ import annotations

from typing import ClassVar

from django.db import models


class Row(models.Model):
    """A row of a session's list. ``owner`` repeats the list, so that a foreign row is seen."""

    list = models.CharField(max_length=40)
    number = models.IntegerField()
    owner = models.CharField(max_length=40)

    objects: ClassVar[models.Manager[Row]] = models.Manager()

    class Meta:
        app_label = "soak"
        indexes: ClassVar = [models.Index(fields=["list", "number"], name="soak_list")]

    def __str__(self) -> str:
        return f"{self.list} {self.number}"
