"""Statement and card of a run, and their files."""
