"""CCF-LLM for Hugging Face: fuse a language model with collaborative filtering for CTR prediction.

Importing this package registers the Auto classes and a pipeline; it opens no file or connection.
`CFEmbeddings` and `CTRRanker` are imported at first use, because they need `datasets` and `pandas`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from ccf_llm_hf.modeling import loading_ccf_llm
from ccf_llm_hf.modeling.checkpoint_ccf_llm import Publishable
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.pipeline_ccf_llm import TASK, CTRRankingPipeline
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor

if TYPE_CHECKING:
    from ccf_llm_hf.cf.embeddings import CFEmbeddings
    from ccf_llm_hf.inference.ranker import CTRRanker

__version__ = "0.1.0"
LAZY = {
    "CFEmbeddings": "ccf_llm_hf.cf.embeddings",
    "CTRRanker": "ccf_llm_hf.inference.ranker",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _local_backbone(name: str) -> str:
    """The cached local copy of a slim checkpoint's backbone, or the name itself."""
    from ccf_llm_hf.data.assets import cached_backbone

    return cached_backbone(name)


def _publish(thing: Any, repo_id: str, **options: Any) -> Any:
    """Check what a model, processor or ranker would send, and send it."""
    from ccf_llm_hf.hub.push import push_object

    return push_object(thing, repo_id, **options)


AutoConfig.register("ccf_llm", CCFLLMConfig, exist_ok=True)
AutoModel.register(CCFLLMConfig, CCFLLMForCTR, exist_ok=True)
AutoModelForSequenceClassification.register(CCFLLMConfig, CCFLLMForCTR, exist_ok=True)
AutoProcessor.register(CCFLLMConfig, CCFLLMProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, CTRRankingPipeline, pt_model=AutoModel, type="text")
CCFLLMConfig.pipeline_is_registered = True
loading_ccf_llm.backbone_resolver = _local_backbone
Publishable.publisher = _publish

__all__ = ["CCFLLMConfig", "CCFLLMForCTR", "CCFLLMProcessor", "CFEmbeddings", "CTRRanker"]
