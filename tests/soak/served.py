"""The site's WSGI and ASGI applications, for gunicorn, uvicorn and granian."""

from __future__ import annotations

import os

from . import clock

clock.follow(os.environ["SOAK_CLOCK"])

from django.core.asgi import get_asgi_application  # noqa: E402
from django.core.wsgi import get_wsgi_application  # noqa: E402

wsgi = get_wsgi_application()
asgi = get_asgi_application()
