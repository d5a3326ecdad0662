"""The model card (README.md) of a checkpoint folder, written from its config and results."""

import importlib.resources
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ccf_llm_hf.data.prepared import load_protocol
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.card_results import eval_results, results_markdown
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig

TEMPLATE = "model_card.md.jinja"
TAGS = ["recommendation", "ctr-prediction", "collaborative-filtering", "ccf-llm"]
HUB_BACKBONES = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
FUSION_SENTENCES = {
    "gate": "a gate weighs the two per item and per dimension.",
    "scalar_gate": "a gate with one weight per item mixes the two (an ablation of the method).",
    "sum": "the two are added (an ablation of the method).",
    "concat": "each item is its title followed by its vector (CoLLM's form, as an ablation).",
    "cf_only": "here the items are vectors only (an ablation of the method).",
    "text_only": "here it reads words only (TALLRec's form, as an ablation).",
}


def describe_run(
    checkpoint_dir: str | Path, data_dir: str | Path, metrics: Mapping[str, Any] | None = None
) -> Path:
    """Write the card of a checkpoint that a recipe trained, with the training.json beside it.

    Args:
        checkpoint_dir: `<output_dir>/checkpoint` or `<output_dir>/checkpoint-slim`.
        data_dir: the prepared folder.
        metrics: report of `evaluate_scores`, or None before evaluation.

    Raises:
        InputError: either folder is not there.
    """
    folder = Path(checkpoint_dir)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: name a checkpoint folder")
    record = folder.parent / "training.json"
    recipe = json.loads(record.read_text(encoding="utf-8"))["recipe"] if record.exists() else None
    return write_model_card(
        folder,
        config=CCFLLMConfig.from_pretrained(folder),
        metrics=metrics,
        recipe=recipe,
        data_protocol=load_protocol(Path(data_dir)),
    )


def write_model_card(
    checkpoint_dir: str | Path,
    *,
    config: Any,
    metrics: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    data_protocol: Mapping[str, Any] | None = None,
) -> Path:
    """Write README.md into a checkpoint folder; no network is used.

    Args:
        checkpoint_dir: the folder; its name becomes the model's.
        config: the checkpoint's `CCFLLMConfig`.
        metrics: report of `evaluation.report.evaluate_scores`, or None if not evaluated.
        recipe: what it was trained by, shown as YAML.
        data_protocol: protocol.json of the prepared data.

    Returns:
        Path of the card.

    Raises:
        InputError: the folder does not exist.
    """
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: save the checkpoint first")
    name = _model_name(folder)
    protocol = dict(data_protocol or {})
    template = importlib.resources.files("ccf_llm_hf.hub_cards").joinpath(TEMPLATE)
    history, candidates = _examples(protocol)
    card = ModelCard.from_template(
        _card_data(name, config, metrics, protocol),
        template_str=template.read_text(encoding="utf-8"),
        model_name=name,
        config=config,
        backbone=_without_local_paths(config.backbone_name),
        fusion_sentence=FUSION_SENTENCES[config.fusion],
        example_history=history,
        example_candidates=candidates,
        results=results_markdown(metrics) if metrics else "",
        protocol=protocol,
        movielens=_is_movielens(protocol),
        recipe=_as_yaml(recipe) if recipe else "",
    )
    path = folder / "README.md"
    partial = folder / "README.md.partial"
    partial.write_text(str(card).rstrip() + "\n", encoding="utf-8")
    return partial.replace(path)


def _card_data(
    name: str, config: Any, metrics: Mapping[str, Any] | None, protocol: Mapping[str, Any]
) -> ModelCardData:
    results: list[EvalResult] = eval_results(metrics, protocol) if metrics else []
    base_model = _hub_backbone(config.backbone_name)
    known: dict[str, Any] = {
        "base_model": base_model,
        # The demo's backbone is Apache-2.0, as is this code; of others nothing is known here.
        "license": "apache-2.0" if base_model in HUB_BACKBONES.values() else None,
        "metrics": ["roc_auc"] if results else None,
    }
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-ranking",
        tags=TAGS,
        model_name=name,
        eval_results=results or None,
        **{key: value for key, value in known.items() if value is not None},
    )


def _model_name(folder: Path) -> str:
    """`runs/demo/checkpoint-slim` is called `demo`: its own name says nothing."""
    folder = folder.resolve()
    generic = folder.name.startswith("checkpoint") and folder.parent.name
    return folder.parent.name if generic else folder.name


def _hub_backbone(backbone: str) -> str | None:
    """Hub id of a backbone given by asset name or Hub id; None for a local folder."""
    if backbone.lower() in HUB_BACKBONES:
        return HUB_BACKBONES[backbone.lower()]
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", backbone) and not Path(backbone).exists()
    return backbone if is_hub_id else None


def _as_yaml(recipe: Mapping[str, Any]) -> str:
    return yaml.safe_dump(_without_local_paths(dict(recipe)), sort_keys=False).strip()


def _without_local_paths(value: Any) -> Any:
    """Absolute paths cut to their last part: a card is shared, its author's machine is not."""
    if isinstance(value, dict):
        return {key: _without_local_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_local_paths(part) for part in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def _is_movielens(protocol: Mapping[str, Any]) -> bool:
    return "movielens" in str(protocol.get("source", "")).lower()


def _examples(protocol: Mapping[str, Any]) -> tuple[str, str]:
    """History and candidates of the usage snippet, as Python."""
    if _is_movielens(protocol):
        return '["Toy Story (1995)", "Heat (1995)"]', '["Jumanji (1995)", "GoldenEye (1995)"]'
    return '["a liked item", "another"]', '["an item", "a new item"]'
