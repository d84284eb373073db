"""
Measurements, among them the figures of the README. Each is taken in one run with its comparison.

See ``python -m benchmarks`` (``__main__.py``) for their names.
"""
