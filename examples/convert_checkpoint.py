"""Convert a checkpoint of release 0.1 to the present form; its scores stay as they are.

python examples/convert_checkpoint.py OLD_FOLDER NEW_FOLDER
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.io import write_folder, write_json
from ccf_llm_hf.modeling.checkpoint_ccf_llm import (
    CF_FILE,
    CODE_FILES,
    FORMAT_VERSION,
    copy_code,
    write_tensors,
)

# Fusions that are prompts now: what fills their slots, if there are any, is the CF vector alone.
FUSIONS = {"concat": "cf_only", "text_only": "cf_only"}
TENSORS = {
    "residual_scale": "cf_logit_scale",
    "model.title_ids": "model.item_text.title_ids",
    "model.title_lengths": "model.item_text.title_lengths",
}
BIAS, EVIDENCE = "gate.linear.bias", "gate.evidence_weight"  # new: the gate read no evidence
GONE = ("fold_in_decay", "slot_dropout", "pairwise_share", "cf_target_share", "num_fits")


def convert_checkpoint(old: Path, new: Path) -> None:
    """Write the converted checkpoint to `new`; `old` stays as it is.

    Raises:
        InputError: `old` is no checkpoint of release 0.1, or scores in a way that is gone.
    """
    if not old.is_dir():
        raise InputError(f"{old} is no folder: name that of a checkpoint")
    file = old / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "cf_residual" not in config:
        raise InputError(f"{old} is no checkpoint of release 0.1: name a folder of one")
    if new.exists():
        raise InputError(f"{new} exists already: name a new folder")
    write_folder(new, lambda folder: _fill(old, folder, config))


def _fill(old: Path, folder: Path, config: dict[str, Any]) -> None:
    shutil.copytree(
        old, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    write_json(folder / "config.json", convert_config(config))
    processor = folder / "processor_config.json"
    if processor.is_file():
        settings = json.loads(processor.read_text(encoding="utf-8"))
        write_json(processor, convert_prompt(settings))
    for weights in folder.glob("*.safetensors"):
        convert_tensors(weights)
    for index in folder.glob("*.safetensors.index.json"):
        shards = json.loads(index.read_text(encoding="utf-8"))
        places = shards["weight_map"]
        shards["weight_map"] = {
            TENSORS.get(name, name): shard
            for name, shard in places.items()
            if not name.endswith("snapshot_times")
        } | {
            name.replace(BIAS, EVIDENCE): shard
            for name, shard in places.items()
            if name.endswith(BIAS)
        }
        write_json(index, shards)
    copy_code(folder)
    assert all((folder / name).is_file() for name in CODE_FILES)


def convert_config(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of config.json in their present names."""
    if config.get("score_head", "yes_minus_no") != "yes_minus_no":
        raise InputError("this checkpoint reads one answer word only, which is gone: train it anew")
    if config["cf_fold_in"] and config["fold_in_decay"] != 1.0:
        raise InputError("this checkpoint folds users in with decay, which is gone: train it anew")
    kept = {key: value for key, value in config.items() if key not in (*GONE, "score_head")}
    kept["cf_logit"] = kept.pop("cf_residual")
    kept["fusion"] = FUSIONS.get(kept["fusion"], kept["fusion"])
    return kept


def convert_prompt(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of processor_config.json in their present names."""
    kept = {
        key: value for key, value in settings.items() if key not in ("layout", "history_labels")
    }
    histories = "signed" if settings.get("history_labels") == "signed" else "likes"
    return kept | {"wording": settings["layout"], "histories": histories}


def convert_tensors(file: Path) -> None:
    """Rename tensors, take the only snapshot of the CF table, and give the gate no evidence, in
    place."""
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if "format_version" in metadata:
        metadata["format_version"] = FORMAT_VERSION
    metadata.pop("num_fits", None)
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        in_table = file.name == CF_FILE or name.startswith("model.cf.")
        if not name.endswith("snapshot_times"):
            converted[TENSORS.get(name, name)] = tensor[-1] if in_table else tensor
        if name.endswith(BIAS):
            converted[name.replace(BIAS, EVIDENCE)] = torch.zeros_like(tensor)
    write_tensors(file, converted, metadata)


def main() -> int:
    """Convert; 2 for bad input."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {sys.argv[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
