"""Rows become checked, grouped and split shards."""
