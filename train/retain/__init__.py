"""What keeps a fine-tuned model from forgetting, and which of its weights are exported."""
