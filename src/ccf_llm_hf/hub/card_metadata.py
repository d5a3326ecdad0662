"""The YAML header of a model card: what the Hub filters, links and lists a checkpoint by."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ccf_llm_hf.data.asset_list import ASSETS
from ccf_llm_hf.data.assets import hub_id
from ccf_llm_hf.hub.card_results import eval_results

TAGS = ["recommendation", "ctr-prediction", "collaborative-filtering", "ccf-llm"]
# Of these backbones the license is known; of others the card claims none.
LICENSES = {asset.hub_id: asset.license_id for asset in ASSETS.values() if asset.hub_id}


def model_card_data(
    name: str, config: Any, metrics: Mapping[str, Any] | None, protocol: Mapping[str, Any]
) -> ModelCardData:
    """Metadata of a checkpoint; what is not known is left out, and nothing is looked up.

    Args:
        name: the model's name in `model-index`.
        config: its `CCFLLMConfig`.
        metrics: report of `evaluate_scores`, or None.
        protocol: protocol.json of the prepared data; may be empty.
    """
    results = eval_results(metrics, protocol, dataset_id(protocol)) if metrics else []
    base = hub_backbone(config.backbone_name)
    known: dict[str, Any] = {
        "language": protocol.get("language"),
        **license_fields(base, protocol),
        "base_model": base,
        "base_model_relation": base and relation(config),
        "datasets": [dataset_id(protocol)] if protocol.get("name") else None,
        "metrics": [result.metric_type for result in results] or None,
    }
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-ranking",
        tags=list(TAGS),
        model_name=name,
        eval_results=results or None,
        **{key: value for key, value in known.items() if value is not None},
    )


def relation(config: Any) -> str:
    """`adapter` when the repo holds only what is added to the backbone, else `finetune`: the Hub
    calls `merge` what blends several models, not a LoRA that was merged into its own base."""
    return "adapter" if config.checkpoint_form == "slim" else "finetune"


def hub_backbone(backbone: str) -> str | None:
    """Hub id of a backbone given by asset name or Hub id; None for a local folder."""
    name = hub_id(backbone.lower()) if backbone.lower() in ASSETS else backbone
    if name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def dataset_id(protocol: Mapping[str, Any]) -> str:
    """Where the prepared data was published, else its name as an id: unlinked, but searchable."""
    name = str(protocol.get("name") or "unnamed")
    return protocol.get("hub_id") or re.sub(r"[^\w.-]+", "-", name).strip("-.")


def license_fields(base: str | None, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The license of the weights: that of backbone and code, unless the data restricts their use.

    CF vectors are learned from the ratings, so where those may not be passed on freely the header
    must not promise Apache-2.0 to whoever filters by it.
    """
    terms = str(protocol.get("license", ""))
    free = not re.search(r"\bnc\b|non-?commercial", terms, re.IGNORECASE)
    if protocol.get("redistributable", True) and free:
        return {"license": LICENSES.get(base or "")}
    link = re.search(r"https://[^\s)]+", terms)
    return {
        "license": "other",
        "license_name": re.sub(r"[^a-z0-9.-]+", "-", f"{dataset_id(protocol)}-terms".lower()),
        "license_link": link and link[0],
    }
