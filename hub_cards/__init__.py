"""Templates of what a Hub repository shows."""
