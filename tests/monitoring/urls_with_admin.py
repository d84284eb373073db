from __future__ import annotations

from django.urls import include, path

from .urls import sign_in
from .urls import urlpatterns as own

urlpatterns = [*own, path("admin/", include(([path("login/", sign_in, name="login")], "admin")))]
