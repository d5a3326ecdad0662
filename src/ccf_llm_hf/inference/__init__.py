"""Inference: score splits, rank and explain."""

import ccf_llm_hf.registration  # noqa: F401
