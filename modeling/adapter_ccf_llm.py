"""LoRA as plain tensors: trained with PEFT, but read, merged and written here.

So that loading a checkpoint needs torch, transformers and safetensors only. In memory an adapter is
a dict keyed by the module's path in the backbone:
`{"layers.0.self_attn.q_proj.lora_A.weight": tensor, ...}`.
"""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_ccf_llm import CCFLLMConfig

PEFT_PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
Adapter = dict[str, Tensor]
Part = tuple[Tensor, Tensor, float]  # A, B and scale of one LoRA of a module
Parts = dict[str, list[Part]]  # by the path of the module


def adapter_scale(lora: dict[str, Any]) -> float:
    """Factor of `B @ A`: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    rank = lora["r"] ** 0.5 if lora.get("use_rslora") else lora["r"]
    return lora["lora_alpha"] / rank


def adapter_parts(adapter: Adapter, scale: float) -> Parts:
    """A and B of each module of an adapter."""
    paths = [name.removesuffix(A_SUFFIX) for name in adapter if name.endswith(A_SUFFIX)]
    return {path: [(adapter[path + A_SUFFIX], adapter[path + B_SUFFIX], scale)] for path in paths}


def injected_parts(backbone: nn.Module) -> Parts:
    """What PEFT's active adapters add to the backbone's modules, but for those merged already.

    Raises:
        ValueError: naming a module that learns otherwise than by plain LoRA.
    """
    parts: Parts = {}
    for path, module in backbone.named_modules():
        if not is_injected(module) or module.disable_adapters:
            continue
        state = module.state_dict()
        for name in module.active_adapters:
            if name in getattr(module, "merged_adapters", ()):
                continue
            held = {key for key in state if key.split(".")[1:2] == [name]}
            down, up = f"lora_A.{name}.weight", f"lora_B.{name}.weight"
            if held - {down, up} or name in getattr(module, "lora_variant", ()):
                raise ValueError(
                    f"The backbone's {path!r} learns by more than plain LoRA, which is all that a "
                    "checkpoint tells from the backbone: merge it into the weights first (PEFT's "
                    "merge_and_unload), and save with form='full'."
                )
            if held:
                part = (state[down].detach(), state[up].detach(), float(module.scaling[name]))
                parts.setdefault(path, []).append(part)
    return parts


def join_parts(
    parts: Parts, backbone: nn.Module, known: dict[str, Any] | None
) -> tuple[Adapter, dict[str, Any] | None]:
    """One adapter that adds what all parts do, and its settings: `known` where they describe it.

    Several LoRA of a module become one of the sum of their ranks.
    """
    if not parts:
        return {}, None
    every = [part for of_path in parts.values() for part in of_path]
    scale = every[0][2]
    rank = max(sum(len(down) for down, _, _ in of_path) for of_path in parts.values())
    if len(every) > len(parts) or any((len(a), s) != (rank, scale) for a, _, s in every):
        parts, scale = {path: [_stack(of_path, rank)] for path, of_path in parts.items()}, 1.0
    adapter: Adapter = {}
    for path, ((down, up, _),) in parts.items():
        adapter |= {path + A_SUFFIX: down, path + B_SUFFIX: up}
    alike = known and known["r"] == rank and math.isclose(adapter_scale(known), scale)
    if known and alike and adapted_modules(known, backbone) == parts.keys():
        return adapter, known
    names = sorted({path.rpartition(".")[2] for path in parts})
    if adapted_modules({"target_modules": names}, backbone) != parts.keys():
        names = sorted(parts)
    settings = {"r": rank, "lora_alpha": scale * rank, "target_modules": names}
    return adapter, settings | {"use_rslora": False, "lora_dropout": 0.0}


def _stack(parts: list[Part], rank: int) -> Part:
    """Several LoRA of one module as one of scale 1, filled up with zeros to `rank`."""
    down = torch.cat([down.float() for down, _, _ in parts])
    up = torch.cat([scale * up.float() for _, up, scale in parts], dim=1)
    missing = rank - len(down)
    return F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing)), 1.0


def adapted_modules(lora: dict[str, Any], backbone: nn.Module) -> set[str]:
    """Paths of the modules that `target_modules` names, as PEFT finds them."""
    targets = lora["target_modules"]
    paths = [name for name, _ in backbone.named_modules() if ".base_layer" not in name]
    if isinstance(targets, str):
        return {path for path in paths if re.fullmatch(targets, path)}
    ends = tuple(f".{target}" for target in targets)
    return {path for path in paths if f".{path}".endswith(ends)}


def add_lora(
    module: nn.Module, weight: Tensor, parts: list[Part], dtype: torch.dtype | None
) -> Tensor:
    """`weight`, that of a plain module, plus `scale * B @ A` of each part; None: its own dtype."""
    total = weight.float()
    for down, up, scale in parts:
        delta = scale * (up.float() @ down.float()).to(weight.device)
        total = total + (delta.T if _is_conv(module) else delta)
    return total.to(dtype or weight.dtype)


@contextmanager
def without_adapter(backbone: nn.Module, merged: Adapter, scale: float) -> Iterator[None]:
    """Let the backbone compute what it would without adapters, be they injected by PEFT or, as
    `merged` and `scale` say, LoRA added to the weights, which stay as they are."""
    handles = [
        module.register_forward_hook(_base_output)
        for module in backbone.modules()
        if hasattr(module, "base_layer")
    ]
    for path, (factors,) in adapter_parts(merged, scale).items():
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


def plain_state(
    module: nn.Module, *, merge: bool = False, but: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """State of a module under the names that it has without PEFT.

    Args:
        merge: what the module computes now, active adapters added to its weights; else these alone.
        but: names that begin so are left out.
    """
    state = {name: w for name, w in module.state_dict().items() if not name.startswith(but)}
    for path, part in module.named_modules():
        if not is_injected(part):
            continue
        inside = [name for name in state if name.startswith(f"{path}.")]
        for name in inside:
            del state[name]
        if inside:
            plain = _plain_module(part, merge).state_dict()
            state |= {f"{path}.{name}": weight for name, weight in plain.items()}
    return state


def is_injected(module: Any) -> bool:
    """Whether PEFT put a module in the place of one of the model's."""
    return hasattr(module, "base_layer") or hasattr(module, "original_module")


def _plain_module(part: Any, merge: bool) -> nn.Module:
    """The module that PEFT's `part` stands for."""
    merge = merge and not part.disable_adapters
    if hasattr(part, "original_module"):  # of modules_to_save
        return part.modules_to_save[part.active_adapters[0]] if merge else part.original_module
    if merge:
        part = copy.deepcopy(part)
        part.merge()
    return part.get_base_layer()


def _is_conv(module: nn.Module) -> bool:
    """Whether a layer is GPT-2's, whose weight is `(in, out)`."""
    return type(getattr(module, "base_layer", module)).__name__ == "Conv1D"


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
        "fan_in_fan_out": any(_is_conv(module) for module in backbone.modules()),
        "inference_mode": True,
        "lora_dropout": 0.0,
        "use_rslora": False,
        **(config.lora or {}),
    }
    return {prefix + name: weight for name, weight in adapter.items()}, settings


def from_peft(tensors: Adapter, backbone: PreTrainedModel, source: str) -> Adapter:
    """The tensors of a PEFT adapter file in this module's form.

    Raises:
        OSError: naming `source`, when it fits another backbone, or holds more or less than an A and
            a B of each module.
    """
    prefix = f"{backbone.base_model_prefix}."
    names = {name: name.removeprefix(PEFT_PREFIX).removeprefix(prefix) for name in tensors}
    adapter = {names[name]: tensor for name, tensor in tensors.items()}
    modules = {name.replace(".base_layer", ""): m for name, m in backbone.named_modules()}
    for name, short in names.items():
        path, lora, kind = short.rpartition(".lora_")
        if not lora or path not in modules:
            raise OSError(
                f"{source} holds {name!r}, which this backbone has no module for: "
                "it belongs to another one."
            )
        other = {"A.weight": "B.weight", "B.weight": "A.weight"}.get(kind)
        if other is None or f"{path}.lora_{other}" not in adapter:
            raise OSError(
                f"{source} holds {name!r} without its other half, or that is no plain LoRA: "
                "restore the file."
            )
    for path, ((down, up, _),) in adapter_parts(adapter, 1.0).items():
        module: Any = modules[path]
        shape = tuple(getattr(module, "base_layer", module).weight.shape)
        found = (len(up), *down.shape[1:])
        if (found[::-1] if _is_conv(module) else found) != shape or up.shape[1:] != (len(down),):
            raise OSError(f"{source} does not fit this backbone at {path!r}: restore the file.")
    return adapter


def check_adapter(adapter: Adapter, lora: dict[str, Any], backbone: nn.Module, source: str) -> None:
    """Raise an OSError naming `source` where an adapter is another one than `lora` describes."""
    parts = adapter_parts(adapter, 1.0)
    wrong = parts.keys() ^ adapted_modules(lora, backbone)
    wrong |= {path for path, ((down, _, _),) in parts.items() if len(down) != lora["r"]}
    if wrong:
        raise OSError(
            f"{source} is not the adapter that config.json describes (at {min(wrong)!r}; r is "
            f"{lora['r']}, target_modules are {lora['target_modules']}): restore the file."
        )


__all__ = ["Adapter"]
