"""A recipe and shards become a run."""
