"""What an installed package adds to transformers: the Auto classes and the pipeline."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from ccf_llm_hf.modeling.configuration_ccf_llm import TASK, CCFLLMConfig
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.pipeline_ccf_llm import CTRRankingPipeline
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor

AutoConfig.register("ccf_llm", CCFLLMConfig, exist_ok=True)
AutoModel.register(CCFLLMConfig, CCFLLMForCTR, exist_ok=True)
AutoModelForSequenceClassification.register(CCFLLMConfig, CCFLLMForCTR, exist_ok=True)
AutoProcessor.register(CCFLLMConfig, CCFLLMProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, CTRRankingPipeline, pt_model=AutoModel, type="text")
