"""Hub: what a checkpoint needs to be shared."""

import ccf_llm_hf.registration  # noqa: F401
