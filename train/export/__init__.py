"""A model becomes one folder that open_clip and transformers both load."""
