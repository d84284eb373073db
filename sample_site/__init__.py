"""A message board that shows what the pins do, on a primary and replicas that lag."""
