"""Captions in a CSV become shards: checked, split by group, written as WebDataset tars."""
