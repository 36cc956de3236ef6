"""Methods, a room of its own for each."""
