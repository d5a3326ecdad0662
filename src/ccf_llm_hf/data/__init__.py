"""Data: fetching, validation, protocols, and the prepared folder that everything else reads."""

from ccf_llm_hf.data.assets import get_asset, load_backbone_path
from ccf_llm_hf.data.config import PrepareConfig
from ccf_llm_hf.data.history import stored_histories, stored_history
from ccf_llm_hf.data.prepare import format_summary, prepare
from ccf_llm_hf.data.prepared import (
    PreparedData,
    earlier_interactions,
    has_times,
    interactions,
    load_prepared,
    load_protocol,
    read_items,
    read_rows,
)

__all__ = [
    "PrepareConfig",
    "PreparedData",
    "earlier_interactions",
    "format_summary",
    "get_asset",
    "has_times",
    "interactions",
    "load_backbone_path",
    "load_prepared",
    "load_protocol",
    "prepare",
    "read_items",
    "read_rows",
    "stored_histories",
    "stored_history",
]
