"""What statements do, and the wrappers that see each of them."""
