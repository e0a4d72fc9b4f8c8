"""An index of a corpus, and what is nearest in it."""
