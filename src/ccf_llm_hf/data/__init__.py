"""Data: fetching, validation, protocols, and the prepared folder that everything else reads."""

from ccf_llm_hf.data.assets import get_asset, load_backbone_path
from ccf_llm_hf.data.prepare import PrepareConfig, format_summary, prepare
from ccf_llm_hf.data.prepared import PreparedData, interactions, load_prepared, load_protocol

__all__ = [
    "PrepareConfig",
    "PreparedData",
    "format_summary",
    "get_asset",
    "interactions",
    "load_backbone_path",
    "load_prepared",
    "load_protocol",
    "prepare",
]
