"""One unit of work: what it did, and the overrides that are active in it. No I/O."""
