"""Read by mypy, not run: what the types of the public names promise."""
