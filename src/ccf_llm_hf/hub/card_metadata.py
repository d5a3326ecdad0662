"""The YAML header of a model card: what the Hub filters, links and lists a checkpoint by."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ccf_llm_hf.data.asset_list import ASSETS
from ccf_llm_hf.data.assets import hub_id
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig

TAGS = ["recommendation", "ctr-prediction", "collaborative-filtering", "ccf-llm"]
# Of these backbones the license is known; of others the card claims none.
LICENSES = {asset.hub_id: asset.license_id for asset in ASSETS.values() if asset.hub_id}
METRIC_NAMES = {"auc": "AUC", "uauc": "UAUC", "wuauc": "WUAUC", "logloss": "log loss", "ece": "ECE"}
METRIC_IDS = {"auc": "roc_auc"}  # as the Hub lists it; the others are known by our names


def build_metadata(
    name: str, config: CCFLLMConfig, metrics: Mapping[str, Any], protocol: Mapping[str, Any]
) -> ModelCardData:
    """Metadata of a checkpoint; what is not known is left out, and nothing is looked up.

    Args:
        name: the model's name in `model-index`.
        config: the checkpoint's. The Hub calls `merge` what blends several models, so a full
            checkpoint, whose LoRA was merged into its own base, is a `finetune`.
        metrics: report of `evaluate_scores`; empty if not evaluated.
        protocol: protocol.json of the prepared data; may be empty.
    """
    results = list_results(metrics, protocol) if metrics else []
    base = find_hub_backbone(config.backbone_name)
    relation = "adapter" if config.checkpoint_form == "slim" else "finetune"
    known: dict[str, Any] = {
        "language": protocol.get("language"),
        **choose_license(base, protocol),
        "base_model": base,
        "base_model_relation": base and relation,
        "datasets": [name_dataset(protocol)] if protocol.get("name") else None,
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


def find_hub_backbone(backbone: str) -> str | None:
    """Hub id of a backbone given by asset name or Hub id; None for a local folder."""
    name = hub_id(backbone.lower()) if backbone.lower() in ASSETS else backbone
    if name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def name_dataset(protocol: Mapping[str, Any]) -> str:
    """Where the prepared data was published, else its name as an id: unlinked, but searchable."""
    name = str(protocol.get("name") or "unnamed")
    return protocol.get("hub_id") or re.sub(r"[^\w.-]+", "-", name).strip("-.")


def choose_license(base: str | None, protocol: Mapping[str, Any]) -> dict[str, Any]:
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
        "license_name": re.sub(r"[^a-z0-9.-]+", "-", f"{name_dataset(protocol)}-terms".lower()),
        "license_link": link and link[0],
    }


def list_results(report: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[EvalResult]:
    """Metadata entries (`model-index`) of the evaluated method, each with the protocol it was
    measured by and, where there is one, its interval; undefined metrics are left out."""
    values = report["methods"][report["name"]]
    measured_on = {
        "label": protocol.get("label_rule"),
        "split": protocol.get("split_rule"),
        "rows": values["rows"],
        "users": values["users"],
    }
    return [
        EvalResult(
            task_type="text-ranking",
            task_name="CTR prediction",
            dataset_type=name_dataset(protocol),
            dataset_name=str(protocol.get("name", "unnamed")),
            dataset_split=report["split"],
            dataset_args={name: fact for name, fact in measured_on.items() if fact is not None},
            metric_type=METRIC_IDS.get(key, key),
            metric_name=name,
            metric_value=round(values[key], 4),
            metric_args=_describe_interval(report, values.get(f"{key}_ci")),
        )
        for key, name in METRIC_NAMES.items()
        if values.get(key) is not None
    ]


def _describe_interval(
    report: Mapping[str, Any], bounds: list[float | None] | None
) -> dict[str, Any] | None:
    if bounds is None or None in bounds:
        return None
    interval = [round(float(bound), 4) for bound in bounds if bound is not None]
    return {"interval": interval, **report["intervals"]}
