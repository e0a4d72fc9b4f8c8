"""An index of the image features of a corpus, and search in it."""
