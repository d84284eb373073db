"""The management commands of the package, and the probes that they share."""
