"""A page on which people look through a data set and decide what to drop or change."""
