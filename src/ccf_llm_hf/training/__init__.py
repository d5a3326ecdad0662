"""Training: recipes of stages, packed batches under a token budget, and the trainer."""

import ccf_llm_hf.registration  # noqa: F401
