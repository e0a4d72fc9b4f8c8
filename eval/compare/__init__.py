"""Comparison of models: paired differences, caption confusion, retention, WiSE-FT."""
