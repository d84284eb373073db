"""URLs of the panel."""

from django.urls import path

from . import views

urlpatterns = [
    path("status/", views.status, name="panel-status"),
    path("<str:alias>/pause/", views.pause, name="panel-pause"),
    path("<str:alias>/resume/", views.resume, name="panel-resume"),
    path("<str:alias>/delay/", views.delay, name="panel-delay"),
]
