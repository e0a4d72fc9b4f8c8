"""Images with labels: zero-shot, linear probes and heads."""
