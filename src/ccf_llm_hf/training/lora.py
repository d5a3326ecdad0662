"""LoRA in the backbone: injected by PEFT, written down in the model's config."""

import dataclasses
from typing import Any

import peft
import torch

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR

RECORDED = ("r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout")
# Fields that a checkpoint need not know: names, and how the weights start.
FREE = (
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "peft_type",
    "peft_version",
    "auto_mapping",
    "fan_in_fan_out",
    "runtime_config",
)
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # leave the base weights as they are


def check_lora(lora: peft.LoraConfig) -> None:
    """Refuse what the plain `scale * B @ A` of a checkpoint cannot hold.

    Raises:
        InputError: naming the field.
    """
    if lora.r < 1 or not 0 <= lora.lora_dropout < 1:
        raise InputError(
            f"lora: r={lora.r} must be above 0, and lora_dropout={lora.lora_dropout} from 0 to 1"
        )
    if lora.init_lora_weights not in PLAIN_STARTS:
        raise InputError(
            f"lora: init_lora_weights={lora.init_lora_weights!r} changes the backbone's weights, "
            "which a checkpoint has not: leave it out"
        )
    default = peft.LoraConfig()
    for field in dataclasses.fields(peft.LoraConfig):
        if field.name in (*RECORDED, *FREE, "init_lora_weights"):
            continue
        value = getattr(lora, field.name)
        if value != getattr(default, field.name):
            raise InputError(
                f"lora: {field.name}={value!r} is more than a checkpoint of this model can hold, "
                f"which knows {', '.join(RECORDED)}: leave it out"
            )


def record_of(lora: peft.LoraConfig) -> dict[str, Any]:
    """What `config.lora` says of it."""
    record = {name: getattr(lora, name) for name in RECORDED}
    if isinstance(lora.target_modules, set):
        record["target_modules"] = sorted(lora.target_modules)
    return record


def inject_lora(model: CCFLLMForCTR, lora: peft.LoraConfig) -> None:
    """Put fresh float32 LoRA modules into the model's backbone and note them in its config.

    Raises:
        InputError: it does not fit the backbone, or is more than a checkpoint holds.
    """
    check_lora(lora)
    try:
        peft.inject_adapter_in_model(lora, model.language_model)
    except ValueError as problem:
        raise InputError(f"LoRA does not fit this backbone: {problem}") from problem
    for _, parameter in model.lora_parameters():
        parameter.data = parameter.data.to(torch.float32)
    model.config.lora = record_of(lora)
