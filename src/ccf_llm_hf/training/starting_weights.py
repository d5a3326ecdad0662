"""What a stage starts from: fresh LoRA, or the slim checkpoint or PEFT adapter that `init_from`
names."""

import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR

ADAPTER_CONFIG = "adapter_config.json"


def inject_lora(model: CCFLLMForCTR, settings: dict[str, Any]) -> None:
    """Put fresh LoRA modules into the model's backbone and note the settings in its config."""
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), model.language_model)
    except ValueError as problem:
        raise InputError(f"LoRA does not fit this backbone: {problem}") from problem
    model.config.lora = settings


def adapter_folder(source: Path) -> Path | None:
    """Where a starting point holds its PEFT adapter; None when it has none."""
    for folder in (source / "adapter", source):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    return None


def lora_of(adapter: Path) -> dict[str, Any]:
    """The LoRA settings of a PEFT adapter folder."""
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    settings = {key: config[key] for key in ("r", "lora_alpha", "target_modules")}
    return settings | {"use_rslora": bool(config.get("use_rslora"))}


def fusion_of(source: Path) -> str | None:
    """Fusion arm of a slim checkpoint; None for a bare adapter folder."""
    if not (source / "fusion.safetensors").is_file():
        return None
    return json.loads((source / "config.json").read_text())["fusion"]


def warn_of_another_backbone(source: Path, fingerprint: str) -> None:
    """Say so when a slim checkpoint was trained on other backbone weights than the run's."""
    if not fusion_of(source):
        return
    trained_on = json.loads((source / "config.json").read_text())
    if trained_on["backbone_fingerprint"] not in ("", fingerprint):
        warnings.warn(
            f"`init_from` {source} was trained on {trained_on['backbone_name']!r}, whose weights "
            "are not those of this recipe's `backbone`; its LoRA may not fit them",
            stacklevel=2,
        )


def digest_folder(source: Path) -> str:
    """Sha256 over the weight files that a stage would start from.

    Raises:
        InputError: when the folder holds no weights.
    """
    adapter = adapter_folder(source)
    files = [source / "fusion.safetensors"] if fusion_of(source) else []
    files += [adapter / "adapter_model.safetensors"] if adapter else []
    if not files or not all(file.is_file() for file in files):
        raise InputError(
            f"`init_from` {source} is neither a slim checkpoint nor a PEFT adapter folder (a full "
            "checkpoint has its LoRA merged: name its slim form)"
        )
    return sha256_of(files)


def sha256_of(files: Iterable[Path]) -> str:
    """Of the contents of files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
