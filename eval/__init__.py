"""A model gets its numbers."""
