"""Captions in a CSV become shards: checked, split by group, written as WebDataset tars."""

# First of all imports of every command, so that Ctrl-C prints one line from then on.
from data_prep import interrupt  # noqa: F401
