"""CCF-LLM for Hugging Face: fuse a language model with collaborative filtering for CTR prediction.

Importing this package registers the Auto classes and a pipeline; it opens no file or connection.
The public names are imported at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ccf_llm_hf import registration  # noqa: F401
from ccf_llm_hf.version import __version__

if TYPE_CHECKING:
    from ccf_llm_hf.cf.vectors import CFVectors
    from ccf_llm_hf.inference.ranker import CTRRanker
    from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig
    from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
    from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
    from ccf_llm_hf.training.arguments import CTRTrainingArguments
    from ccf_llm_hf.training.trainer import CTRTrainer

LAZY = {
    "CCFLLMConfig": "ccf_llm_hf.modeling.configuration_ccf_llm",
    "CCFLLMForCTR": "ccf_llm_hf.modeling.modeling_ccf_llm",
    "CCFLLMProcessor": "ccf_llm_hf.modeling.processing_ccf_llm",
    "CFVectors": "ccf_llm_hf.cf.vectors",
    "CTRRanker": "ccf_llm_hf.inference.ranker",
    "CTRTrainer": "ccf_llm_hf.training.trainer",
    "CTRTrainingArguments": "ccf_llm_hf.training.arguments",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CCFLLMConfig",
    "CCFLLMForCTR",
    "CCFLLMProcessor",
    "CFVectors",
    "CTRRanker",
    "CTRTrainer",
    "CTRTrainingArguments",
    "__version__",
]
