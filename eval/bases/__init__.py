"""Which model to start from."""
