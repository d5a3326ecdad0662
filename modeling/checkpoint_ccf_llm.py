"""What a checkpoint folder holds: LoRA as plain tensors, fingerprints, files that say what is off.

LoRA is trained with PEFT but read and written here, so that loading a checkpoint needs torch,
transformers and safetensors only. In memory an adapter is a dict keyed by the module's path in the
backbone: `{"layers.0.self_attn.q_proj.lora_A.weight": tensor, ...}`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from .configuration_ccf_llm import ids_fingerprint

FORMAT_VERSION = "1"
CF_FILE = "cf_embeddings.safetensors"
FUSION_FILE = "fusion.safetensors"
CATALOG_FILE = "item_catalog.jsonl"
USERS_FILE = "user_ids.jsonl"
ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
CODE_FILES = (
    "configuration_ccf_llm.py",
    "layout_ccf_llm.py",
    "checkpoint_ccf_llm.py",
    "cf_table_ccf_llm.py",
    "packing_ccf_llm.py",
    "prompt_ccf_llm.py",
    "tiles_ccf_llm.py",
    "pipeline_ccf_llm.py",
    "processing_ccf_llm.py",
    "catalog_ccf_llm.py",
    "loading_ccf_llm.py",
    "loss_ccf_llm.py",
    "modeling_ccf_llm.py",
)

CF_TENSORS = (
    "user_vectors",
    "item_vectors",
    "user_known",
    "item_known",
    "default_user",
    "default_item",
    "offset",
    "snapshot_times",
)
HUB_ARGUMENTS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "subfolder",
)

Adapter = dict[str, Tensor]


class Publishable:
    """`push_to_hub` of model and processor."""

    # An installed ccf_llm_hf puts a function here that checks files before it sends them.
    publisher: ClassVar[Callable[..., Any] | None] = None

    def _push_to_hub(self, repo_id: str, *args: Any, **options: Any) -> Any:
        """Upload to a Hub repository, in one commit.

        With ccf_llm_hf installed, the files are checked for secrets and local paths before, and
        the options are those of its `hub.push.push_object`; else they are transformers' own.
        """
        if Publishable.publisher is None:
            return super().push_to_hub(repo_id, *args, **options)  # type: ignore[misc]
        return Publishable.publisher(self, repo_id, *args, **options)

    # To type checkers, transformers' own is no plain method, and can be overridden by none.
    push_to_hub: Any = _push_to_hub


def read_ids(file: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file of `{"id": ..., "title": ...}` in table order.

    Raises:
        ValueError: naming the file and line that is not such a row.
    """
    rows = []
    with Path(file).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                rows.append({**row, "id": str(row["id"])})
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: not a JSON object with an id.") from error
    return rows


def write_ids(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines under a temporary name, then rename."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.replace(file)


def find_file(
    path_or_repo: str, name: str, hub: dict[str, Any], required: bool = True
) -> str | None:
    """Path of a checkpoint's file, local or from the Hub; None when optional and absent.

    Raises:
        OSError: naming the file, when it is required and not there.
    """
    folder, _, file = name.rpartition("/")
    inside = "/".join(part for part in (hub.get("subfolder", ""), folder) if part)
    options = {key: value for key, value in hub.items() if key != "subfolder"}
    return cached_file(
        path_or_repo,
        file,
        subfolder=inside,
        _raise_exceptions_for_missing_entries=required,
        **options,
    )


def check_catalog(path: str, hub: dict[str, Any], fingerprint: str) -> None:
    """Refuse CF tables beside another catalog than theirs, at load instead of by an IndexError.

    Raises:
        OSError: naming the files, when they are there and do not match `fingerprint`.
    """
    items = find_file(path, CATALOG_FILE, hub, required=False)
    users = find_file(path, USERS_FILE, hub, required=False)
    if not items or not users or not fingerprint:
        return
    found = ids_fingerprint(
        [row["id"] for row in read_ids(users)], [row["id"] for row in read_ids(items)]
    )
    if found != fingerprint:
        raise OSError(
            f"{items} or {users} is not the catalog that this checkpoint was saved with: "
            "restore the files of one checkpoint."
        )


def load_tokenizer(path: str, hub: dict[str, Any], trusted: bool) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    A tokenizer.json is read as it is: the Auto class would look at config.json, whose model type is
    this code's, and ask once more whether to trust it.
    """
    if find_file(path, "tokenizer.json", hub, required=False):
        return PreTrainedTokenizerFast.from_pretrained(path, **hub)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trusted, **hub)


def read_tensors(file: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        OSError: naming the file, when it is truncated, no safetensors file, or of another format
            version than this code reads.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            # Files by other libraries, such as an adapter by PEFT, have no such version.
            version = metadata.get("format_version", FORMAT_VERSION)
            if version != FORMAT_VERSION:
                raise OSError(
                    f"{file} has format version {version}, and this code reads version "
                    f"{FORMAT_VERSION}: load it with a newer ccf-llm-hf."
                )
            return {key: handle.get_tensor(key) for key in handle.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise OSError(
            f"{file} is damaged or truncated ({error}): copy or download it again."
        ) from error


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it."""
    partial = file.with_name(file.name + ".partial")
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        partial,
        metadata,
    )
    partial.replace(file)


def copy_code(folder: Path) -> None:
    """Ship the modeling code, so that `trust_remote_code=True` works from the folder alone.

    As remote code, a processor is loaded without the model's file; the model ships that one itself.
    """
    for name in CODE_FILES:
        source = Path(__file__).with_name(name)
        if source.exists() and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)


def backbone_fingerprint(backbone: nn.Module) -> str:
    """Sha256 (hex) over names, shapes and a strided sample of up to 1024 values of each parameter.

    Values are rounded to bfloat16 first, so that loading the same weights in float32 or bfloat16
    gives the same fingerprint. Quantized or otherwise altered weights give another (our choice).
    """
    digest = hashlib.sha256()
    for name, weight in sorted(plain_state(backbone).items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)][:1024].to(torch.bfloat16).cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def plain_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The backbone's state as if no LoRA were injected: base weights under their plain names."""
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in backbone.state_dict().items()
        if ".lora_" not in name
    }


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


def write_adapter(folder: Path, adapter: Adapter, backbone: nn.Module, config: Any) -> None:
    """Write LoRA in PEFT's format, for the causal language model around the backbone."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"{PEFT_PREFIX}{backbone.base_model_prefix}."
    tensors = {prefix + name: weight for name, weight in adapter.items()}
    write_tensors(folder / ADAPTER_FILE, tensors, {"format": "pt"})
    conv = any(type(module).__name__ == "Conv1D" for module in backbone.modules())
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.backbone_name,
        "revision": config.backbone_revision,
        "bias": "none",
        "fan_in_fan_out": conv,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "use_rslora": False,
        **config.lora,
    }
    write_json(folder / ADAPTER_CONFIG, settings)


def read_adapter(file: str, backbone: nn.Module) -> Adapter:
    """Read a PEFT adapter file into this module's form.

    Raises:
        OSError: naming the file, when it is damaged or fits another backbone.
    """
    tensors, _ = read_tensors(file)
    prefix = f"{backbone.base_model_prefix}."
    modules = {name.replace(".base_layer", "") for name, _ in backbone.named_modules()}
    adapter = {}
    for name, weight in tensors.items():
        path = name.removeprefix(PEFT_PREFIX).removeprefix(prefix)
        if path.rsplit(".lora_", 1)[0] not in modules:
            raise OSError(
                f"{file} holds {name!r}, which this backbone has no module for: "
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
            f"The adapter in {source} does not fit this stage's LoRA at {min(wrong)!r}: "
            "use the same lora_r and lora_target_modules as the stage that wrote it."
        )
    with torch.no_grad():
        for name, value in targets.items():
            live[name].copy_(value)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write JSON under a temporary name, then rename it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(file)


__all__ = [
    "backbone_fingerprint",
    "injected_adapter",
    "merge_adapter",
    "read_adapter",
    "write_adapter",
]
