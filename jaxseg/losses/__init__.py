"""Losses: pure functions from logits, labels and a validity mask to per-image values."""
