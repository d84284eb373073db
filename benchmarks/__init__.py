"""
Measurements, among them the figures of docs/benchmarks.md. Each run measures its comparison too.

See ``python -m benchmarks`` (``__main__.py``) for their names.
"""
