"""Two-dimensional problems with known answers."""
