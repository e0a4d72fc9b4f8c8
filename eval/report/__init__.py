"""HTML and plots that every command uses."""
