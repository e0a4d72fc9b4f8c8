"""Everything that knows open_clip's insides."""
