"""What a stage starts from: the slim checkpoint or PEFT adapter that `init_from` names."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers.utils import logging

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.io import sha256_of
from ccf_llm_hf.modeling.adapter_ccf_llm import from_peft
from ccf_llm_hf.modeling.checkpoint_ccf_llm import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    ADAPTER_FOLDER,
    FUSION_FILE,
    TEXT_FILE,
    TEXT_SETTINGS,
    TEXT_SPACE,
    read_json,
    read_tensors,
    reading,
)
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import PROCESSOR_FILE
from ccf_llm_hf.training.lora import check_lora, inject_lora

logger = logging.get_logger(__name__)

# What `warm_start` reads, as patterns of a Hub repository's files.
STARTING_FILES = [
    "config.json",
    PROCESSOR_FILE,
    FUSION_FILE,
    f"{ADAPTER_FOLDER}/*",
    ADAPTER_CONFIG,
    ADAPTER_FILE,
]


def warm_start(model: CCFLLMForCTR, source: Path, dropout: float = 0.0) -> None:
    """Load the weights that a folder holds for this model: LoRA, injected with its own rank and
    modules, and those of fusion and score if they filled slots in the same way.

    Args:
        model: fresh, without LoRA.
        source: a slim checkpoint or a PEFT adapter folder.
        dropout: of the LoRA modules.

    Raises:
        InputError: LoRA does not fit the backbone.
        ValueError, OSError: weights of another shape, or damaged files.
    """
    warn_of_another_backbone(source, model.config.backbone_fingerprint)
    adapter = find_adapter(source)
    if adapter:
        inject_lora(model, peft.LoraConfig(**read_lora(adapter), lora_dropout=dropout))
    if fills_slots_alike(source, model.config):
        load_trained_weights(model, source)
    elif adapter:
        load_adapter(model, adapter)


def load_trained_weights(model: CCFLLMForCTR, folder: Path) -> None:
    """Copy a slim checkpoint's fusion weights and adapter into a live model.

    Alignment networks for CF vectors of another width are left fresh, and a log line says so.

    Raises:
        ValueError: naming a weight of another shape, or text vectors in another space.
        OSError: naming a damaged file.
    """
    live = dict(model.fusion_parameters() + model.head_parameters())
    tensors, _ = read_tensors(str(folder / FUSION_FILE))
    _take_text_vectors(model, folder, tensors)
    tensors = {name: value for name, value in tensors.items() if name in live}
    wrong = [name for name, value in tensors.items() if value.shape != live[name].shape]
    of_cf = ("model.item_alignment.", "model.user_alignment.")
    if any(name.startswith(of_cf) and ".up." in name for name in wrong):
        logger.warning(
            "The alignment networks start afresh, because those in %s are for CF vectors of "
            "another width: train them.",
            folder,
        )
        wrong = [name for name in wrong if not name.startswith(of_cf)]
        tensors = {n: value for n, value in tensors.items() if not n.startswith(of_cf)}
    if wrong:
        raise ValueError(
            f"{folder} holds {min(wrong)!r} for another backbone or alignment_multiplier."
        )
    model.load_state_dict(tensors, strict=False)
    if model.lora_parameters():
        load_adapter(model, folder / ADAPTER_FOLDER)


def _take_text_vectors(model: CCFLLMForCTR, folder: Path, fusion: dict[str, Tensor]) -> None:
    """Have the text vectors that a checkpoint's weights were trained on."""
    text: Any = model.model.item_text
    names = [f"model.item_text.{name}" for name in TEXT_SPACE]
    if model.config.item_text == "static" or not all(name in fusion for name in names):
        return
    space = {name: fusion[f"model.item_text.{name}"] for name in TEXT_SPACE}
    if all(torch.equal(value, getattr(text, name).cpu()) for name, value in space.items()):
        return
    file = folder / TEXT_FILE
    vectors, metadata = read_tensors(str(file)) if file.is_file() else ({}, {})
    fits = all(value.shape == getattr(text, name).shape for name, value in space.items())
    if not fits or metadata.get("ids_fingerprint") != model.config.ids_fingerprint:
        raise ValueError(
            f"{folder} was trained on text vectors in another space than this model's: build "
            "the model with text_space_of=FOLDER, and read words as that one does."
        )
    text.load_state_dict(space | vectors)


def load_adapter(model: CCFLLMForCTR, folder: Path) -> None:
    """Copy a PEFT adapter folder into the LoRA modules injected into a model's backbone.

    Raises:
        ValueError: names or shapes differ from what was injected.
        OSError: naming the file, when it is damaged or fits another backbone.
    """
    file = str(folder / ADAPTER_FILE)
    adapter = from_peft(read_tensors(file)[0], model.language_model, file)
    live = dict(model.language_model.named_parameters())
    targets = {name.replace(".weight", ".default.weight"): value for name, value in adapter.items()}
    injected = {name for name in live if ".lora_" in name}
    wrong = injected ^ targets.keys()
    wrong |= {name for name in injected & targets.keys() if live[name].shape != targets[name].shape}
    if wrong:
        raise ValueError(
            f"The adapter in {folder} does not fit the injected LoRA at {min(wrong)!r}: "
            "inject one of the same r and target_modules."
        )
    with torch.no_grad():
        for name, value in targets.items():
            live[name].copy_(value)


def find_adapter(source: Path) -> Path | None:
    """Where a starting point holds its PEFT adapter; None when it has none."""
    for folder in (source / ADAPTER_FOLDER, source):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    return None


def read_lora(adapter: Path) -> dict[str, Any]:
    """The LoRA settings of a PEFT adapter folder.

    Raises:
        InputError: it is no LoRA, or more than plain LoRA, such as one with scales by layer.
    """
    with reading(adapter, ADAPTER_CONFIG):
        config = peft.PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, peft.LoraConfig):
        raise InputError(f"`init_from` {adapter} holds {config.peft_type}, not LoRA")
    try:
        check_lora(config)
    except InputError as problem:
        raise InputError(f"`init_from` {adapter}: {problem}") from problem
    names = ("r", "lora_alpha", "target_modules", "use_rslora")
    return {name: getattr(config, name) for name in names}


def fills_slots_alike(source: Path, config: CCFLLMConfig) -> bool:
    """Whether a slim checkpoint fills slots as a model of `config` does: with the same fusion, of
    words that are read in the same way. Not where its prompt shows none, or for a bare adapter."""
    if not (source / FUSION_FILE).is_file():
        return False
    prompt = read_json(source / PROCESSOR_FILE)
    if prompt.get("history_format") == prompt.get("candidate_format") == "title":
        return False
    saved = {"item_text": "static"} | read_json(source / "config.json")
    read = TEXT_SETTINGS if config.item_text == "contextual" else ("item_text",)
    return all(saved.get(name) == getattr(config, name) for name in ("fusion", *read))


def is_full(source: Path) -> bool:
    """Whether a folder is a full checkpoint, whose adapter alone would leave its fusion behind."""
    config = source / "config.json"
    saved = read_json(config) if config.is_file() else {}
    return saved.get("checkpoint_form") == "full"


def warn_of_another_backbone(source: Path, fingerprint: str) -> None:
    """Say so when a slim checkpoint was trained on other backbone weights than the run's."""
    if not (source / FUSION_FILE).is_file():
        return
    trained_on = read_json(source / "config.json")
    if trained_on.get("backbone_fingerprint") not in ("", fingerprint):
        warnings.warn(
            f"`init_from` {source} was trained on {trained_on.get('backbone_name')!r}, whose "
            "weights are not those of this recipe's `backbone`; its LoRA may not fit them",
            stacklevel=2,
        )


def hash_start(source: Path) -> str:
    """Sha256 over the weight files that a stage would start from.

    Raises:
        InputError: when the folder holds no weights.
    """
    try:
        adapter = None if is_full(source) else find_adapter(source)
    except OSError as problem:
        raise InputError(f"`init_from` {problem}") from problem
    files = []
    if (source / FUSION_FILE).is_file():
        files.append(source / FUSION_FILE)
    if adapter:
        files.append(adapter / ADAPTER_FILE)
    if not files or not all(file.is_file() for file in files):
        raise InputError(
            f"`init_from` {source} is neither a slim checkpoint nor a PEFT adapter folder (a full "
            "checkpoint has its LoRA merged: name its slim form)"
        )
    return sha256_of(files)


def hash_start_settings(source: Path) -> str:
    """Sha256 over the settings that say what the weights of a start are, and its text vectors."""
    adapter = find_adapter(source) or source
    names = ("config.json", PROCESSOR_FILE, TEXT_FILE)
    files = [*(source / name for name in names), adapter / ADAPTER_CONFIG]
    return sha256_of(file for file in files if file.is_file())
