"""Whole networks: from images to logits."""
