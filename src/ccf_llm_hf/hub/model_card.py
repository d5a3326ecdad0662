"""The model card (README.md) of a checkpoint folder, rendered from the facts in its card.json.

`card.json` holds what the card says and no other file beside it does; config.json and
processor_config.json are read where they lie. Whatever changes a checkpoint (evaluation, merging,
a push) renders the card anew. A README.md that is not what was rendered last is somebody's own
words, and is left alone.
"""

import importlib.resources
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard

from ccf_llm_hf.data.asset_list import ASSETS
from ccf_llm_hf.data.prepared import load_protocol
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.card_metadata import build_metadata, find_hub_backbone
from ccf_llm_hf.hub.card_tables import differences_table, format_number, methods_table
from ccf_llm_hf.hub.checkpoint_files import CARD_FILE, EXAMPLE_FILE, FACTS_FILE, cut_paths
from ccf_llm_hf.io import sha256_of, write_json, write_text
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CATALOG_FILE, read_ids
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig
from ccf_llm_hf.version import __version__

TEMPLATE = "model_card.md.jinja"
TRAINING_FILE = "training.json"
# The oldest releases that the tests load and score checkpoints with.
REQUIREMENTS = {"torch": "2.13", "transformers": "5.20", "safetensors": "0.8"}
WELL_KNOWN = ("Toy Story (1995)", "Heat (1995)", "Jumanji (1995)", "GoldenEye (1995)")
PLACEHOLDERS = ("a liked item", "another liked item", "an item", "another item")


@dataclass
class CardFacts:
    """What a card says that config.json and processor_config.json do not.

    Args:
        name: the model's.
        example: the call that the usage code shows: `history` and `candidates`, lists of titles.
        version: of the package whose code lies beside the weights.
        backbone_source: where the backbone was obtained; empty if that is not known.
        training: training.json of the run, or as much of it as there is.
        protocol: protocol.json of the prepared data.
        metrics: report of `evaluate_scores`, with the gate's (see `inference.gate.gate_report`).
        readme: sha256 of the README.md that was rendered last.
    """

    name: str
    example: dict[str, list[str]]
    version: str = __version__
    backbone_source: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    readme: str = ""


def describe_run(
    checkpoint_dir: str | Path, data_dir: str | Path, metrics: Mapping[str, Any] | None = None
) -> Path:
    """Write facts and card of a checkpoint that a recipe trained, with the training.json above it.

    Args:
        checkpoint_dir: `<output_dir>/checkpoint` or `<output_dir>/checkpoint-slim`.
        data_dir: the prepared folder.
        metrics: report of `evaluate_scores`, or None before evaluation; its `gate` entry (see
            `inference.gate.gate_report`) is shown too.

    Returns:
        Path of the card.

    Raises:
        InputError: either folder is not there.
    """
    folder = Path(checkpoint_dir)
    record = folder.parent / TRAINING_FILE
    training = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    facts = read_facts(folder)
    facts.version = training.get("versions", {}).get("ccf-llm-hf", facts.version)
    facts.backbone_source = training.get("backbone", {}).get("source") or ""
    facts.training = training
    facts.protocol = load_protocol(Path(data_dir))
    facts.metrics = dict(metrics or {})
    return write_card(folder, facts)


def read_facts(folder: Path) -> CardFacts:
    """The facts in a checkpoint's card.json; without one, what the folder itself tells.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / FACTS_FILE
    if not file.is_file():
        return CardFacts(_choose_name(folder), _choose_example(folder))
    try:
        facts = CardFacts(**json.loads(file.read_text(encoding="utf-8")))
        titles = [*facts.example["history"], *facts.example["candidates"]]
        if all(isinstance(title, str) for title in titles):
            return facts
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"{file} does not hold the facts of a card: mend it, or delete it and have it written "
        "anew by ccf-llm evaluate --card"
    )


def has_own_words(folder: Path) -> bool:
    """Whether somebody wrote the README.md of a checkpoint, or changed it since it was rendered."""
    card = folder / CARD_FILE
    return card.is_file() and sha256_of([card]) != read_facts(folder).readme


def write_card(folder: Path, facts: CardFacts | None = None, *, repo: str = "") -> Path:
    """Write card.json and the README.md that it makes; one with words of its own stays.

    Args:
        folder: the checkpoint folder.
        facts: default those that it holds. Paths in them are cut to their last part.
        repo: see `render_card`.

    Returns:
        Path of the card.

    Raises:
        InputError: see `render_card`.
    """
    facts, card = facts or read_facts(folder), folder / CARD_FILE
    facts = CardFacts(**cut_paths(asdict(facts)))
    text = render_card(folder, facts, repo=repo)
    if has_own_words(folder):
        kept = "was written by hand and stays; delete it to have it rendered"
        print(f"{folder.name}/{CARD_FILE} {kept}", file=sys.stderr)
    else:
        write_text(card, text)
        facts.readme = sha256_of([card])
    write_json(folder / FACTS_FILE, asdict(facts))
    return card


def render_card(folder: Path, facts: CardFacts, *, repo: str = "") -> str:
    """The card of a checkpoint, slim or full as its config says; no network is used.

    Args:
        folder: holds config.json, and processor_config.json unless it is a model's alone.
        facts: what the card says beyond those.
        repo: Hub repository that the usage code loads; default the folder by its name, so that
            the code runs from the folder's parent.

    Raises:
        InputError: the folder has no config.json.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: name a checkpoint folder")
    config, settings = CCFLLMConfig.from_pretrained(folder), folder / "processor_config.json"
    prompt = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    item_formats = {prompt.get(f"{place}_format", "slot") for place in ("history", "candidate")}
    data = build_metadata(facts.name, config, facts.metrics, facts.protocol)
    asset = find_asset(config.backbone_name)
    terms = ASSETS[asset].license if asset and ASSETS[asset].license_id != "apache-2.0" else ""
    template = importlib.resources.files("ccf_llm_hf.hub_cards").joinpath(TEMPLATE)
    card = ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        facts=facts,
        config=config,
        item_formats=sorted(item_formats),
        repo=repo or folder.resolve().name,
        backbone=cut_paths(config.backbone_name),
        backbone_source=name_source_to_supply(config, facts.backbone_source),
        backbone_asset=asset,
        base_model=data.base_model,
        backbone_terms=terms,
        printed=tell_printed(folder, facts.example, config.logit_temperature),
        requirements=REQUIREMENTS,
        license=data.license,
        movielens="movielens" in str(facts.protocol.get("source", "")).lower(),
        recipe=yaml.safe_dump(facts.training.get("recipe") or {}, sort_keys=False).strip(),
        quote_items=lambda items: json.dumps(items, ensure_ascii=False),
        format_number=format_number,
        methods_table=methods_table,
        differences_table=differences_table,
    )
    return str(card).rstrip() + "\n"


def tell_printed(
    folder: Path, example: Mapping[str, list[str]], temperature: float
) -> dict[str, str]:
    """What the card's code prints, by the logits that `example.json` records of its call: the
    `tensor` of probabilities and the three lines of the `ranked` list; empty without a record."""
    file = folder / EXAMPLE_FILE
    try:
        calls = json.loads(file.read_text(encoding="utf-8"))["calls"] if file.is_file() else []
        (logits,) = (call["logits"] for call in calls if call["inputs"] == example)
        chances = torch.sigmoid(torch.tensor(logits) / temperature)
        pairs = zip(chances[0].tolist(), example["candidates"], strict=True)
    except (ValueError, KeyError, TypeError):
        return {}  # a damaged record is the business of who reads it: `hub.example`
    ranked = sorted(pairs, key=lambda pair: -pair[0])[:3]
    lines = "\n".join(f"{chance:.3f}  {title}" for chance, title in ranked)
    return {"tensor": str(chances), "ranked": lines}


def name_source_to_supply(config: CCFLLMConfig, source: str) -> str:
    """Where a slim checkpoint's backbone came from, when whoever loads it must supply that: a
    local folder, or weights that are not those the Hub has under its name. Else empty.

    Args:
        config: the checkpoint's.
        source: where its backbone was obtained, if that was recorded.
    """
    if config.checkpoint_form != "slim":
        return ""
    base = find_hub_backbone(config.backbone_name)
    if base is None:
        return "a local folder"
    return "" if source.endswith(base) else source


def find_asset(backbone: str) -> str:
    """Name under which the package fetches a backbone; empty when it does not."""
    names = [a.name for a in ASSETS.values() if a.hub_id and backbone in (a.name, a.hub_id)]
    return names[0] if names else ""


def _choose_name(folder: Path) -> str:
    """`runs/demo/checkpoint-slim` is called `demo`: its own name says nothing."""
    folder = folder.resolve()
    generic = folder.name.startswith("checkpoint") and folder.parent.name
    return folder.parent.name if generic else folder.name


def _choose_example(folder: Path) -> dict[str, list[str]]:
    """History and candidates of the usage code, from the checkpoint's own catalog."""
    catalog = folder / CATALOG_FILE
    rows = read_ids(catalog) if catalog.is_file() else []
    plain = [title for row in rows if _is_plain(title := str(row.get("title") or ""))]
    titles = dict.fromkeys([*plain, *PLACEHOLDERS])
    chosen = WELL_KNOWN if titles.keys() >= set(WELL_KNOWN) else list(titles)[: len(WELL_KNOWN)]
    return {
        "history": list(chosen[:2]),
        "candidates": [*chosen[2:], "A title outside the catalog"],
    }


def _is_plain(title: str) -> bool:
    """Fit to stand in a code block."""
    return bool(title.strip()) and title.isprintable() and "`" not in title
