"""Retrieval: captions find images, images find captions and each other."""
