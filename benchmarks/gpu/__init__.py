"""A quarter of an hour on one GPU: what must be known, in order of value."""
