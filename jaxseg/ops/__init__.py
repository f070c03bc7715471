"""Pure functions on arrays: no parameters, no config, no state."""
