"""How fast a step is, where its time goes, and how that compares with open_clip_train."""
