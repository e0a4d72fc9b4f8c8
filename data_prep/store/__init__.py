"""Shards behind a URL: a store that is read in pieces, and a bounded folder that keeps them."""
