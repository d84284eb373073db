"""One unit of work: what it did, and the blocks that are open in it. No I/O."""
