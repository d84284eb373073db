"""URLs of the board."""

from django.urls import path

from . import api, views

urlpatterns = [
    path("", views.board, name="board"),
    path("api/messages/", api.messages, name="api-messages"),
    path("api/whoami/", api.whoami, name="api-whoami"),
]
