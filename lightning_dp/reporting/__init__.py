"""Privacy statement and privacy card of a run, and their files."""
