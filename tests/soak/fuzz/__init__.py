"""Specs, `--set` values and command lines from a seeded generator: `python -m tests.soak.fuzz`."""
