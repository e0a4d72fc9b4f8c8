"""A run on a cluster: scripts that survive it, and a small real cluster to prove that they do."""
