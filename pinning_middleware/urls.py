"""
URLs of the status page for staff:

    path("pinning/", include("pinning_middleware.urls")),
"""

from django.urls import path

from pinning_middleware import status_page

app_name = "pinning_middleware"
urlpatterns = [
    path("", status_page.page, name="status"),
    path("data/", status_page.data, name="status-data"),
]
