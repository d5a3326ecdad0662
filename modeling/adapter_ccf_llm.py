"""LoRA as plain tensors: trained with PEFT, but read, merged and written here.

So that loading a checkpoint needs torch, transformers and safetensors only. In memory an adapter is
a dict keyed by the module's path in the backbone:
`{"layers.0.self_attn.q_proj.lora_A.weight": tensor, ...}`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_ccf_llm import CCFLLMConfig

PEFT_PREFIX = "base_model.model."
Adapter = dict[str, Tensor]


def adapter_scale(lora: dict[str, Any]) -> float:
    """Factor of `B @ A`: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    rank = lora["r"] ** 0.5 if lora.get("use_rslora") else lora["r"]
    return lora["lora_alpha"] / rank


def injected_adapter(backbone: nn.Module) -> Adapter:
    """LoRA tensors of the modules that PEFT injected into the backbone; empty if there are none."""
    return {
        name.replace(".default.weight", ".weight"): weight.detach()
        for name, weight in backbone.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }


def merge_adapter(
    backbone: nn.Module, state: dict[str, Tensor], adapter: Adapter, scale: float
) -> None:
    """Add `scale * B @ A` to the base weights of `state`, the backbone's plain state, in place."""
    for name in [key for key in adapter if key.endswith(".lora_A.weight")]:
        path = name.removesuffix(".lora_A.weight")
        down, up = adapter[name].float(), adapter[f"{path}.lora_B.weight"].float()
        module = backbone.get_submodule(path)
        delta = scale * (up @ down).to(state[f"{path}.weight"].device)
        if type(getattr(module, "base_layer", module)).__name__ == "Conv1D":
            delta = delta.T
        base = state[f"{path}.weight"]
        state[f"{path}.weight"] = (base.float() + delta).to(base.dtype)


@contextmanager
def without_adapter(backbone: nn.Module, merged: Adapter, scale: float) -> Iterator[None]:
    """Let the backbone compute what it would without LoRA, be that injected by PEFT or, as `merged`
    and `scale` say, added to the weights, which stay as they are."""
    handles = [
        module.register_forward_hook(_base_output)
        for module in backbone.modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    ]
    for name in [key for key in merged if key.endswith(".lora_A.weight")]:
        path = name.removesuffix(".lora_A.weight")
        factors = (merged[name], merged[f"{path}.lora_B.weight"], scale)
        module = backbone.get_submodule(path)
        handles.append(module.register_forward_hook(partial(_subtract, *factors)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _base_output(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.base_layer(*args)


def _subtract(
    down: Tensor, up: Tensor, scale: float, module: nn.Module, args: tuple[Tensor], output: Tensor
) -> Tensor:
    x = args[0]
    return output - scale * (x @ down.to(x).mT) @ up.to(x).mT


def plain_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The backbone's state as if no LoRA were injected: base weights under their plain names."""
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in backbone.state_dict().items()
        if ".lora_" not in name
    }


def to_peft(
    adapter: Adapter, backbone: PreTrainedModel, config: CCFLLMConfig
) -> tuple[Adapter, dict[str, Any]]:
    """Tensors and settings as PEFT writes them, for the causal language model around `backbone`."""
    prefix = f"{PEFT_PREFIX}{backbone.base_model_prefix}."
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.backbone_name,
        "revision": config.backbone_revision,
        "bias": "none",
        "fan_in_fan_out": any(type(module).__name__ == "Conv1D" for module in backbone.modules()),
        "inference_mode": True,
        "lora_dropout": 0.0,
        "use_rslora": False,
        **(config.lora or {}),
    }
    return {prefix + name: weight for name, weight in adapter.items()}, settings


def from_peft(tensors: Adapter, backbone: PreTrainedModel, source: str) -> Adapter:
    """The tensors of a PEFT adapter file in this module's form.

    Raises:
        OSError: naming `source`, when it fits another backbone.
    """
    prefix = f"{backbone.base_model_prefix}."
    modules = {name.replace(".base_layer", "") for name, _ in backbone.named_modules()}
    adapter = {}
    for name, weight in tensors.items():
        path = name.removeprefix(PEFT_PREFIX).removeprefix(prefix)
        if path.rsplit(".lora_", 1)[0] not in modules:
            raise OSError(
                f"{source} holds {name!r}, which this backbone has no module for: "
                "it belongs to another one."
            )
        adapter[path] = weight
    return adapter


def load_injected_adapter(backbone: nn.Module, adapter: Adapter, source: str) -> None:
    """Copy an adapter into the LoRA modules that PEFT injected.

    Raises:
        ValueError: when names or shapes differ from what was injected.
    """
    live = dict(backbone.named_parameters())
    targets = {name.replace(".weight", ".default.weight"): value for name, value in adapter.items()}
    injected = {name for name in live if ".lora_" in name}
    wrong = injected ^ targets.keys()
    wrong |= {name for name in injected & targets.keys() if live[name].shape != targets[name].shape}
    if wrong:
        raise ValueError(
            f"The adapter in {source} does not fit the injected LoRA at {min(wrong)!r}: "
            "inject one of the same r and target_modules."
        )
    with torch.no_grad():
        for name, value in targets.items():
            live[name].copy_(value)


__all__ = ["Adapter", "injected_adapter", "load_injected_adapter", "merge_adapter"]
