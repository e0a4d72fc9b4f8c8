"""Captions and groups of a data set that look wrong."""
