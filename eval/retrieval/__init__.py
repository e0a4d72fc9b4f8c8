"""Captions find images, images find captions and each other."""
