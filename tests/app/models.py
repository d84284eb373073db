from __future__ import annotations

from typing import Any

from django.contrib.contenttypes.fields import GenericForeignKey, GenericRelation
from django.contrib.contenttypes.models import ContentType
from django.db import models

from pinning_middleware.managers import SlaveManager, SlaveMixin


class Author(models.Model):
    name = models.CharField(max_length=100, unique=True)

    def __str__(self) -> str:
        return self.name


class Tag(models.Model):
    name = models.CharField(max_length=100)

    def __str__(self) -> str:
        return self.name


class Note(models.Model):
    text = models.CharField(max_length=100)
    content_type = models.ForeignKey(ContentType, models.CASCADE)
    object_id = models.PositiveBigIntegerField()
    about = GenericForeignKey()

    def __str__(self) -> str:
        return self.text


class Book(models.Model):
    title = models.CharField(max_length=100)
    author = models.ForeignKey(Author, models.CASCADE, null=True)
    tags = models.ManyToManyField(Tag)
    notes = GenericRelation(Note)

    def __str__(self) -> str:
        return self.title


class OwnBook(Book):
    """A model with from_db(), as in Django's documentation."""

    class Meta:
        proxy = True

    @classmethod
    def from_db(cls, db: Any, field_names: Any, values: Any, **kwargs: Any) -> OwnBook:
        instance = cls(*values)
        instance._state.adding = False
        instance._state.db = db
        return instance


class Account(models.Model):
    """A model of another pool, see tests.app.routers.UsersRouter."""

    name = models.CharField(max_length=100)

    def __str__(self) -> str:
        return self.name


class Slurpee(SlaveMixin, models.Model):
    number = models.IntegerField()

    objects = SlaveManager()

    def __str__(self) -> str:
        return str(self.number)
