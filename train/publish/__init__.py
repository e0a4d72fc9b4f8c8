"""A run becomes a repository of the Hugging Face hub, with a model card."""
