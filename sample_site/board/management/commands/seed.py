"""`seed`: a few users and messages, for an empty board."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import User
from django.core.management.base import BaseCommand
from django.db import transaction

from sample_site.board.models import Message

CONVERSATION = (
    ("ada", "Good morning! Is the new board up?"),
    ("grace", "It is. One primary takes the writes, two replicas answer the reads."),
    ("ada", "And when a replica lags, do I still see what I just wrote?"),
    ("grace", "You do: after a write, your own reads go to the primary for a while."),
    ("ada", "Everybody else keeps reading from the replicas, then?"),
    ("grace", "Exactly. Pause them with the buttons, post something, and see for yourself."),
)


class Command(BaseCommand):
    """Fills an empty board; leaves any other as it is."""

    help = "Fill an empty board with users (password = name) and a few messages."

    def handle(self, *args: Any, **options: Any) -> None:
        """Write it all or nothing."""
        with transaction.atomic():
            if User.objects.exists():
                self.stdout.write("There are users already; nothing to do.")
                return
            User.objects.create_superuser("admin", password="admin")
            users = {
                name: User.objects.create_user(name, password=name) for name in ("ada", "grace")
            }
            for name, text in CONVERSATION:
                Message.objects.create(author=users[name], text=text)
        self.stdout.write(f"{len(CONVERSATION)} messages by {len(users)} users are on the board.")
