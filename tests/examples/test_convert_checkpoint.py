"""A checkpoint as release 0.1 wrote it: refused with the mend, converted, and scored as before."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import ARMS, BuildModel

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.checkpoint import load_checkpoint

SCRIPT = Path(__file__).parents[2] / "examples" / "convert_checkpoint.py"
CALL = {"user": "u0", "history": ["i1", "i2"], "candidates": ["i0", "i3", {"title": "A new film"}]}
specification = importlib.util.spec_from_file_location("convert_checkpoint", SCRIPT)
assert specification is not None and specification.loader is not None
convert = importlib.util.module_from_spec(specification)
specification.loader.exec_module(convert)


def age(folder: Path, arm: str) -> None:
    """Rewrite a checkpoint as release 0.1 wrote it."""
    old_names = {new: old for old, new in convert.TENSORS.items()}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() | {"format_version": "1"}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        aged = {}
        for name, tensor in tensors.items():
            table = file.name == "cf_embeddings.safetensors" or name.startswith("model.cf.")
            if not name.endswith("evidence_weight"):
                aged[old_names.get(name, name)] = tensor[None].contiguous() if table else tensor
        if file.name == "cf_embeddings.safetensors":
            aged["snapshot_times"] = torch.zeros(1, dtype=torch.long)
        if file.name == "model.safetensors":
            aged["model.cf.snapshot_times"] = torch.zeros(1, dtype=torch.long)
        save_file(aged, file, metadata)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= {"cf_residual": config.pop("cf_logit"), "fold_in_decay": 1.0, "slot_dropout": 0.0}
    config |= {"num_fits": 1, "score_head": "yes_minus_no", "pairwise_share": 0.0}
    if arm in convert.FUSIONS:
        config["fusion"] = arm
    file.write_text(json.dumps(config))
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings |= {"layout": settings.pop("wording"), "history_labels": "positives"}
    del settings["histories"]
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize("form", ["full", "slim"])
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "text_only"])
def test_a_converted_checkpoint_scores_as_before(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, arm: str, form: str
) -> None:
    model, processor = build(arm, lora=True, cf_logit=arm == "sum")
    if model.model.gate is not None:
        torch.nn.init.zeros_(model.model.gate.evidence_weight)
    model.save_pretrained(tmp_path / "old", form=form)
    processor.save_pretrained(tmp_path / "old")
    age(tmp_path / "old", arm)
    with pytest.raises(InputError, match=r"ccf-llm-hf 0\.1: convert it by `python examples/conv"):
        load_checkpoint(str(tmp_path / "old"), backbone=str(backbone_folder()))
    convert.convert_checkpoint(tmp_path / "old", tmp_path / "new")
    backbone = str(backbone_folder()) if form == "slim" else None
    loaded, again = load_checkpoint(str(tmp_path / "new"), backbone=backbone)
    torch.testing.assert_close(
        loaded(**again(**CALL)).logits, model(**processor(**CALL)).logits, atol=1e-5, rtol=0
    )
    with pytest.raises(InputError, match="exists already"):
        convert.convert_checkpoint(tmp_path / "old", tmp_path / "new")


def test_what_is_no_old_checkpoint_is_named(build: BuildModel, tmp_path: Path) -> None:
    model, processor = build()
    model.save_pretrained(tmp_path / "new")
    processor.save_pretrained(tmp_path / "new")
    for folder, wrong in (("new", r"checkpoint of release 0\.1"), ("nowhere", "folder")):
        with pytest.raises(InputError, match=rf"{folder} is no {wrong}"):
            convert.convert_checkpoint(tmp_path / folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"score_head": "yes_only"}, {"cf_fold_in": True, "fold_in_decay": 0.9}]
)
def test_scores_that_cannot_be_kept_are_refused(
    build: BuildModel, tmp_path: Path, change: dict[str, object]
) -> None:
    model, processor = build()
    model.save_pretrained(tmp_path / "old")
    processor.save_pretrained(tmp_path / "old")
    age(tmp_path / "old", "gate")
    file = tmp_path / "old" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match="which is gone: train it anew"):
        convert.convert_checkpoint(tmp_path / "old", tmp_path / "out")
    assert not (tmp_path / "out").exists()
