"""Hub: what a checkpoint needs to be shared."""
