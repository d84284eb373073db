"""Where a read goes, and what it does when its server fails."""
