"""Several mixers at once."""
