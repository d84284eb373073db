"""A page that lists books and adds some; run by `test_panel.py`."""

from __future__ import annotations

from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

wsgi = StaticFilesHandler(get_wsgi_application())

from debug_toolbar.toolbar import debug_toolbar_urls  # noqa: E402
from django.utils.html import format_html, format_html_join  # noqa: E402

from pinning_middleware import use_replica  # noqa: E402
from tests.app.models import Book  # noqa: E402


def shelf(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        Book.objects.create(title=request.POST["title"])
    titles = list(Book.objects.order_by("title").values_list("title"))
    with use_replica():
        number = Book.objects.count()
    return HttpResponse(
        format_html(
            '<!doctype html><html lang="en"><title>Books</title><body><h1>Books</h1><ul>{}</ul>'
            '<p>{} or so</p><form method="post"><input name="title"><button>Add</button></form>'
            "</body></html>",
            format_html_join("", "<li>{}</li>", titles),
            number,
        )
    )


urlpatterns = [path("", shelf), *debug_toolbar_urls()]
