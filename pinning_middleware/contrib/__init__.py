"""Leaves for other packages, each alone: none is imported unless a site does it."""
