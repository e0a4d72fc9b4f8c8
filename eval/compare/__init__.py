"""Models beside each other: differences, confusion, forgetting, WiSE-FT."""
