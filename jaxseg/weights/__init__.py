"""Files of weights: what is published where, and how files are read and written."""
