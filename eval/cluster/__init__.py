"""What is in a corpus: named clusters, a map, near-duplicates."""
