"""A new model's text tower for an index of another model's image features."""
