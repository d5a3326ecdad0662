"""What an installed package adds to transformers: Auto classes, the pipeline, a local backbone.

`import ccf_llm_hf` imports this; so does every subpackage that works with models, for the command
line, which starts without it.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from ccf_llm_hf.modeling import loading_ccf_llm
from ccf_llm_hf.modeling.checkpoint_ccf_llm import Publishable
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.pipeline_ccf_llm import TASK, CTRRankingPipeline
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor


def _local_backbone(name: str) -> str:
    """The cached local copy of a slim checkpoint's backbone, or the name itself."""
    from ccf_llm_hf.data.assets import cached_backbone

    return cached_backbone(name)


def _publish(thing: Any, repo_id: str, **options: Any) -> Any:
    """Check what a model, processor or ranker would send, and send it."""
    from ccf_llm_hf.hub.push import push

    return push(thing, repo_id, **options)


AutoConfig.register("ccf_llm", CCFLLMConfig, exist_ok=True)
AutoModel.register(CCFLLMConfig, CCFLLMForCTR, exist_ok=True)
AutoModelForSequenceClassification.register(CCFLLMConfig, CCFLLMForCTR, exist_ok=True)
AutoProcessor.register(CCFLLMConfig, CCFLLMProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, CTRRankingPipeline, pt_model=AutoModel, type="text")
CCFLLMConfig.pipeline_is_registered = True
loading_ccf_llm.backbone_resolver = _local_backbone
Publishable.publisher = _publish
