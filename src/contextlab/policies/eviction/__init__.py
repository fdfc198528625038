"""Which tokens are kept: policies that drop tokens, or merge them into others."""
