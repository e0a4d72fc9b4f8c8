"""Sample numbers become batches; seed and position decide everything in them."""
