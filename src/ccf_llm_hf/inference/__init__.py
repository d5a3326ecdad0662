"""Inference: score splits, rank and explain."""
