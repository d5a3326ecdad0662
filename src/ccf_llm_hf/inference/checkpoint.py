"""Load a checkpoint for inference, and say in one sentence what is wrong with it."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ccf_llm_hf.data.asset_list import ASSETS
from ccf_llm_hf.data.assets import load_backbone_path
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor


def load_checkpoint(
    path_or_repo: str, *, backbone: str | None = None, **kwargs: Any
) -> tuple[CCFLLMForCTR, CCFLLMProcessor]:
    """Model (in evaluation mode) and processor of a checkpoint folder or Hub repository.

    Args:
        backbone: for a slim checkpoint, what to attach instead of the recorded one: a folder, a Hub
            id, or an asset's name, which is fetched if it is not in the cache.

    Raises:
        InputError: the checkpoint is missing, damaged, or does not fit its backbone.
    """
    check_checkpoint(path_or_repo)
    if backbone in ASSETS:
        backbone, _ = load_backbone_path(backbone, offline=constants.HF_HUB_OFFLINE)
    try:
        processor = CCFLLMProcessor.from_pretrained(path_or_repo, **kwargs)
        model = CCFLLMForCTR.from_pretrained(path_or_repo, backbone=backbone, **kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"checkpoint {path_or_repo} cannot be loaded: {reason}") from error
    check_parts(model, processor, path_or_repo)
    return model.eval(), processor


def check_parts(model: CCFLLMForCTR, processor: CCFLLMProcessor, path: str) -> None:
    """Refuse a processor that writes other prompts than its model reads.

    Raises:
        InputError: naming the files that disagree.
    """
    config = model.config
    slots = ("item_slot_token_id", "user_slot_token_id") if processor.uses_slots else ()
    wrong = [name for name in slots if getattr(config, name) != getattr(processor, name)]
    if bool(config.sentence_encoder) != (processor.text_tokenizer is not None):
        wrong.append("sentence_encoder")
    if wrong:
        raise InputError(
            f"checkpoint {path} cannot be loaded: its config.json and its tokenizers disagree "
            f"about {wrong[0]}; restore the files of one checkpoint"
        )


def check_checkpoint(path: str) -> None:
    """Refuse what can be neither a checkpoint's folder nor a Hub repository.

    Raises:
        InputError: it is neither, or the folder of a training run, which holds its checkpoints.
    """
    folder = Path(path)
    if folder.is_dir():
        inner = folder / "checkpoint-slim"
        if inner.is_dir() and not (folder / "config.json").is_file():
            raise InputError(f"{path} is the folder of a training run: name its {inner}")
        return
    hub_like = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)
    # `runs/typo` looks like a repository, but where runs/ is a folder it is a mistyped path.
    if not hub_like or folder.parent.is_dir():
        raise InputError(
            f"checkpoint {path} is not a folder, and no Hub repository (org/name) either: "
            "make one with ccf-llm train"
        )
