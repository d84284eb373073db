"""A message board that demonstrates pinning, on a primary and lagging replicas."""
