"""Checked by mypy, not run: the types of the public names."""
