"""The board's page."""

from __future__ import annotations

from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_http_methods

from .forms import MessageForm
from .models import Message

SHOWN = 30


@require_http_methods(["GET", "HEAD", "POST"])
def board(request: HttpRequest) -> HttpResponse:
    """Show the newest messages; take a new one and redirect to where it must be seen."""
    form = MessageForm(request.POST or None)
    if request.method == "POST":
        if not request.user.is_authenticated:
            return redirect_to_login(reverse("board"))
        form.instance.author = request.user
        if form.is_valid():
            message = form.save()
            return redirect(f"{reverse('board')}#message-{message.pk}")
    messages = Message.objects.select_related("author")[:SHOWN]
    return render(request, "board/board.html", {"form": form, "board_messages": messages})
