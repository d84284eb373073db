from django.urls import path

from . import views

urlpatterns = [
    path("", views.comments),
    path("async/", views.acomments),
    path("forgetful/", views.forgetful),
    path("count/", views.count),
    path("hide/<int:number>/", views.hide),
]
