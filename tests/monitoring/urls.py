"""A site that includes the page."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.urls import include, path


def sign_in(request: HttpRequest) -> HttpResponse:
    return HttpResponse("Who are you?")


urlpatterns = [
    path("pinning/", include("pinning_middleware.urls")),
    path("sign-in/", sign_in, name="sign-in"),
]
