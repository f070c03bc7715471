"""Scores, as sums that merge by addition and are divided once at the end."""
