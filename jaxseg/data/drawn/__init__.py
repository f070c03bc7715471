"""Data sets that are drawn: they need no files."""
