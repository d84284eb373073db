"""
Measurements, among them the figures of docs/benchmarks.md. Each is taken in one run with its comparison.

See ``python -m benchmarks`` (``__main__.py``) for their names.
"""
