"""Classification of labelled images: zero-shot, and heads on frozen features."""
