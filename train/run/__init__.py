"""The run folder: who may write to it, what is in it, how it is saved and stopped."""
