"""Load a checkpoint for inference, and say in one sentence what is wrong with it."""

from typing import Any

from ccf_llm_hf.checkpoint_path import check_checkpoint
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor


def load_checkpoint(
    path_or_repo: str, *, backbone: str | None = None, **kwargs: Any
) -> tuple[CCFLLMForCTR, CCFLLMProcessor]:
    """Model (in evaluation mode) and processor of a checkpoint folder or Hub repository.

    Raises:
        InputError: the checkpoint is missing, damaged, or does not fit its backbone.
    """
    check_checkpoint(path_or_repo)
    try:
        processor = CCFLLMProcessor.from_pretrained(path_or_repo, **kwargs)
        model = CCFLLMForCTR.from_pretrained(path_or_repo, backbone=backbone, **kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"checkpoint {path_or_repo} cannot be loaded: {reason}") from error
    return model.eval(), processor
