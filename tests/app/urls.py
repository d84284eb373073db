from __future__ import annotations

from django.urls import path

from . import views

urlpatterns = [
    path("sync/<str:does>/", views.sync_view),
    path("async/<str:does>/", views.async_view),
    path("non-atomic/<str:does>/", views.non_atomic_view),
]
