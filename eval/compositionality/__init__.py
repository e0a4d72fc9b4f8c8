"""Counting, binding, relations and word order, on drawings with known captions."""
