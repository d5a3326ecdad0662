"""Training: recipes of stages, packed batches under a token budget, and the trainer."""
