"""
The status page for staff, to mount where a site likes:

    path("pinning/", include("pinning_middleware.urls")),
"""

from django.urls import path

from pinning_middleware import status_page

app_name = "pinning_middleware"
urlpatterns = [
    path("", status_page.page, name="status"),
    path("data/", status_page.data, name="status-data"),
]
