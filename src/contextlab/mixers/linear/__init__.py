"""Linear attention: outer products of keys and values add up in a matrix, which may decay."""
