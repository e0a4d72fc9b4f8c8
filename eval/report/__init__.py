"""Plots and images for the pages of all commands."""
