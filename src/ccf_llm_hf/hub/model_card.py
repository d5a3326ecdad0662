"""The model card (README.md) of a checkpoint folder, written from its config and results."""

import importlib.resources
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ccf_llm_hf import __version__
from ccf_llm_hf.data.asset_list import ASSETS
from ccf_llm_hf.data.prepared import load_protocol
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.card_metadata import hub_backbone, model_card_data
from ccf_llm_hf.hub.card_results import gate_markdown, results_markdown
from ccf_llm_hf.hub.card_training import (
    gate_sentence,
    inputs_markdown,
    machine_sentence,
    recipe_yaml,
    stages_markdown,
    without_local_paths,
)
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CATALOG_FILE, read_ids
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig

TEMPLATE = "model_card.md.jinja"
TRAINING_FILE = "training.json"
# The oldest releases that the tests load and score checkpoints with.
REQUIREMENTS = {"torch": "2.13", "transformers": "5.21", "safetensors": "0.8"}
FUSION_SENTENCES = {
    "gate": "a gate weighs the two per item and per dimension.",
    "scalar_gate": "a gate with one weight per item mixes the two (an ablation of the method).",
    "sum": "the two are added (an ablation of the method).",
    "concat": "each item is its title followed by its vector (CoLLM's form, as an ablation).",
    "cf_only": "here the items are vectors only (an ablation of the method).",
    "text_only": "here it reads words only (TALLRec's form, as an ablation).",
}
WELL_KNOWN = ("Toy Story (1995)", "Heat (1995)", "Jumanji (1995)", "GoldenEye (1995)")
PLACEHOLDERS = ("a liked item", "another liked item", "an item", "another item")
REPO_LINE = re.compile(r'^repo = ".*?".*$', re.MULTILINE)


def describe_run(
    checkpoint_dir: str | Path, data_dir: str | Path, metrics: Mapping[str, Any] | None = None
) -> Path:
    """Write the card of a checkpoint that a recipe trained, with the training.json beside it.

    Args:
        checkpoint_dir: `<output_dir>/checkpoint` or `<output_dir>/checkpoint-slim`.
        data_dir: the prepared folder.
        metrics: report of `evaluate_scores`, or None before evaluation; its `gate` entry (see
            `inference.gate.gate_report`) is shown too.

    Raises:
        InputError: either folder is not there.
    """
    folder = Path(checkpoint_dir)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: name a checkpoint folder")
    record = folder.parent / TRAINING_FILE
    return write_model_card(
        folder,
        config=CCFLLMConfig.from_pretrained(folder),
        metrics=metrics,
        training=json.loads(record.read_text(encoding="utf-8")) if record.exists() else None,
        data_protocol=load_protocol(Path(data_dir)),
    )


def write_model_card(
    checkpoint_dir: str | Path,
    *,
    config: Any,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    data_protocol: Mapping[str, Any] | None = None,
) -> Path:
    """Write README.md into a checkpoint folder; no network is used.

    The usage code names the folder, so that it runs from the folder's parent; `address_card` points
    it at a Hub repository.

    Args:
        checkpoint_dir: the folder; its name becomes the model's.
        config: the checkpoint's `CCFLLMConfig`; for slim or full, the folder's own form counts.
        metrics: report of `evaluation.report.evaluate_scores`, or None if not evaluated.
        training: training.json of the run, or as much of it as there is.
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
    protocol, run = dict(data_protocol or {}), dict(training or {})
    history, candidates = _examples(folder)
    template = importlib.resources.files("ccf_llm_hf.hub_cards").joinpath(TEMPLATE)
    data = model_card_data(name, config, metrics, protocol)
    card = ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        model_name=name,
        repo=folder.resolve().name,
        config=config,
        fusion_sentence=FUSION_SENTENCES[config.fusion],
        backbone=without_local_paths(config.backbone_name),
        backbone_source=_backbone_source(config, run),
        backbone_asset=_asset_name(config.backbone_name),
        backbone_terms=_backbone_terms(config.backbone_name),
        example_history=json.dumps(history, ensure_ascii=False),
        example_candidates=json.dumps(candidates, ensure_ascii=False),
        requirements=REQUIREMENTS,
        results=results_markdown(metrics) if metrics else "",
        gate=gate_markdown(metrics["gate"])
        if metrics and metrics.get("gate")
        else gate_sentence(run),
        protocol=protocol,
        license=data.license,
        movielens=is_movielens(protocol),
        recipe=recipe_yaml(run),
        stages=stages_markdown(run),
        machine=machine_sentence(run),
        inputs=inputs_markdown(run),
        version=run.get("versions", {}).get("ccf-llm-hf", __version__),
    )
    path = folder / "README.md"
    partial = folder / "README.md.partial"
    partial.write_text(str(card).rstrip() + "\n", encoding="utf-8")
    return partial.replace(path)


def address_card(text: str, repo_id: str) -> str:
    """A card whose usage code loads `repo_id` from the Hub instead of the folder."""
    return REPO_LINE.sub(f'repo = "{repo_id}"', text)


def as_full_card(text: str) -> str:
    """The card of a slim checkpoint, as that of the full one it was merged into."""
    for pattern, replacement in (
        (r"^\| Form \|.*$", "| Form | full: self-contained |"),
        (r"^base_model_relation: .*$", "base_model_relation: finetune"),
        (r'^(backbone = "|model_kwargs = \{"backbone").*\n', ""),
        (r", (backbone=backbone|model_kwargs=model_kwargs)(?=[,)])", ""),
        (r"^The backbone this checkpoint was trained on came from .*\n\n", ""),
    ):
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


def is_movielens(protocol: Mapping[str, Any]) -> bool:
    """Whether the prepared data says of itself that it comes from MovieLens."""
    return "movielens" in str(protocol.get("source", "")).lower()


def _model_name(folder: Path) -> str:
    """`runs/demo/checkpoint-slim` is called `demo`: its own name says nothing."""
    folder = folder.resolve()
    generic = folder.name.startswith("checkpoint") and folder.parent.name
    return folder.parent.name if generic else folder.name


def _backbone_source(config: Any, training: Mapping[str, Any]) -> str:
    """Where a slim checkpoint's backbone came from, when `from_pretrained` cannot fetch it by its
    name: a local folder, or weights that are not those the Hub has under that name. Else empty."""
    if config.checkpoint_form != "slim":
        return ""
    base = hub_backbone(config.backbone_name)
    if base is None:
        return "a local folder"
    source = str((training.get("backbone") or {}).get("source") or "")
    return "" if source.endswith(base) else source


def _asset_name(backbone: str) -> str:
    """Name under which the package fetches a backbone; empty when it does not."""
    names = [a.name for a in ASSETS.values() if a.hub_id and backbone in (a.name, a.hub_id)]
    return names[0] if names else ""


def _backbone_terms(backbone: str) -> str:
    """The license of a backbone that has another one than the code; empty when it is not known."""
    asset = ASSETS.get(_asset_name(backbone))
    return asset.license if asset and asset.license_id != "apache-2.0" else ""


def _examples(folder: Path) -> tuple[list[str], list[str]]:
    """History and candidates of the usage code, from the checkpoint's own catalog."""
    catalog = folder / CATALOG_FILE
    rows = read_ids(catalog) if catalog.is_file() else []
    plain = [title for row in rows if _is_plain(title := str(row.get("title") or ""))]
    titles = dict.fromkeys([*plain, *PLACEHOLDERS])
    chosen = WELL_KNOWN if titles.keys() >= set(WELL_KNOWN) else list(titles)[: len(WELL_KNOWN)]
    return list(chosen[:2]), [*chosen[2:], "A title outside the catalog"]


def _is_plain(title: str) -> bool:
    """Fit to stand in a code block."""
    return bool(title.strip()) and title.isprintable() and "`" not in title
