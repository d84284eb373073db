"""The package's commands, and how they ask every server at once."""
