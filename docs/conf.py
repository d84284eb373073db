"""Sphinx configuration. ``make docs`` builds the site, without any resource from outside."""

from __future__ import annotations

import sys
from pathlib import Path

import django
from django.conf import settings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# autodoc imports the package, whose modules read settings.
settings.configure(
    DATABASES={
        alias: {"ENGINE": "django.db.backends.sqlite3"} for alias in ("default", "replica1")
    },
    INSTALLED_APPS=["pinning_middleware"],
    PINNING_REPLICAS=["replica1"],
    USE_TZ=True,
)
django.setup()

project = "pinning_middleware"
author = "The pinning_middleware maintainers"
project_copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

# Every heading down to this level can be linked to, by the anchor that GitHub generates.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_use_type_comments = False
add_module_names = False
python_use_unqualified_type_names = True
# Types of Django and Python: their inventories would have to be downloaded.
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_title = "pinning_middleware"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "source_repository": "https://github.com/pinning-middleware/pinning-middleware/",
    "source_branch": "main",
    "source_directory": "docs/",
}
# Examples in docstrings are Python, as far as they can be parsed.
highlight_language = "default"
# The headings of a page name its functions already.
toc_object_entries = False
