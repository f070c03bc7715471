"""One training loop: state, optimiser, placement, checkpoints, logs."""
