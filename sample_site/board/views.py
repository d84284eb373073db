"""The page of the board."""

from __future__ import annotations

from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_http_methods

from . import tasks
from .forms import MessageForm
from .models import Message

SHOWN = 30


@require_http_methods(["GET", "HEAD", "POST"])
def board(request: HttpRequest) -> HttpResponse:
    """Show the newest messages; save a new one and redirect to the page that shows it."""
    form = MessageForm(request.POST or None)
    if request.method == "POST":
        if not request.user.is_authenticated:
            return redirect_to_login(reverse("board"))
        form.instance.author = request.user
        if form.is_valid():
            message = form.save()
            count = "count" in request.POST and tasks.count_later(request.user.pk)
            query = f"?count={count}" if count else ""
            return redirect(f"{reverse('board')}{query}#message-{message.pk}")
    messages = Message.objects.select_related("author")[:SHOWN]
    counted = tasks.result(request.GET.get("count", ""))
    context = {"form": form, "board_messages": messages, "count": counted}
    return render(request, "board/board.html", context)
