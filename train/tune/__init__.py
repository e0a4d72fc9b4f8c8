"""Several runs that differ in a few values, and one table of what they reached."""
