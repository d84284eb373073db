"""The site for a WSGI server; static files included, since nothing else serves them here."""

import os

from django.contrib.staticfiles.handlers import StaticFilesHandler
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "sample_site.settings")
application = StaticFilesHandler(get_wsgi_application())
