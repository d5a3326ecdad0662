"""Saved = loaded, in both forms, with the package and without it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import BuildModel, inject_lora
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
)

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.data import assets
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.training.warm_start import load_adapter, load_trained_weights

CALL = {
    "user": "u0",
    "history": ["i1", "i2", "i7"],
    "candidates": ["i0", "i3", "i7", "A new film (2024)"],
}


def logits(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> torch.Tensor:
    with torch.no_grad():
        return model(**processor(**CALL)).logits


def save(model: CCFLLMForCTR, processor: CCFLLMProcessor, folder: Path, form: str) -> Path:
    model.save_pretrained(folder, form=form)
    processor.save_pretrained(folder)
    return folder


def options(form: str, folder: Path) -> dict[str, str]:
    return {"backbone": str(folder)} if form == "slim" else {}


@pytest.mark.parametrize("form", ["full", "slim"])
def test_resaved_equals_saved_and_ships_the_code(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    model, processor = build(lora=True)
    first = save(model, processor, tmp_path / "first", form)
    loaded = AutoModel.from_pretrained(first, **options(form, backbone_folder()))
    second = save(loaded, AutoProcessor.from_pretrained(first), tmp_path / "second", None)
    names = {str(path.relative_to(first)) for path in first.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(second)) for path in second.rglob("*") if path.is_file()}
    assert {"modeling_ccf_llm.py", "processing_ccf_llm.py", "attention_ccf_llm.py"} <= names
    for file in first.rglob("*.safetensors"):
        old, new = load_file(file), load_file(second / file.relative_to(first))
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


CLEAN_LOAD = """
import json, sys, torch
sys.modules["ccf_llm_hf"] = None  # importing it fails
sys.modules["peft"] = None
from transformers import AutoModel, AutoModelForSequenceClassification, AutoProcessor
folder, call, kwargs = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for auto in (AutoModel, AutoModelForSequenceClassification):
    model = auto.from_pretrained(folder, trust_remote_code=True, **kwargs)
    with torch.no_grad():
        scores = model(**processor(**call)).logits
model.save_pretrained(sys.argv[4])
processor.save_pretrained(sys.argv[4])
again = AutoModel.from_pretrained(sys.argv[4], trust_remote_code=True, **kwargs)
AutoProcessor.from_pretrained(sys.argv[4], trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(**processor(**call)).logits, scores)
print("LOGITS", json.dumps(scores.tolist()))
"""


@pytest.mark.parametrize("form", ["full", "slim"])
def test_loads_where_the_package_is_not_installed(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    model, processor = build(lora=True)
    folder = save(model, processor, tmp_path / "saved", form)
    run = subprocess.run(
        [
            *(sys.executable, "-c", CLEAN_LOAD, str(folder), json.dumps(CALL)),
            *(json.dumps(options(form, backbone_folder())), str(tmp_path / "again")),
        ],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Do you wish to run" not in run.stdout + run.stderr, "trust was given once already"
    found = torch.tensor(json.loads(run.stdout.split("LOGITS ")[1]))
    torch.testing.assert_close(found, logits(model, processor), atol=1e-5, rtol=0)


def test_adapter_loads_in_plain_peft(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    model, processor = build(lora=True)
    save(model, processor, tmp_path, "slim")
    plain = AutoModelForCausalLM.from_pretrained(backbone_folder())
    tuned = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = model.language_model(input_ids=ids).last_hidden_state
        hidden = tuned(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)


def test_trained_weights_load_into_a_live_model(build: BuildModel, tmp_path: Path) -> None:
    model, processor = build(lora=True)
    save(model, processor, tmp_path, "slim")
    expected = logits(model, processor)
    with torch.no_grad():
        for _, weight in model.lora_parameters() + model.fusion_parameters():
            weight.add_(0.1)
    assert (logits(model, processor) - expected).abs().max() > 1e-3
    load_trained_weights(model, tmp_path)
    torch.testing.assert_close(logits(model, processor), expected)


def test_an_adapter_of_another_shape_is_refused(build: BuildModel, tmp_path: Path) -> None:
    model, processor = build(lora=True)
    save(model, processor, tmp_path, "slim")
    other, _ = build()
    inject_lora(other)
    other.language_model.layers[0].self_attn.q_proj.lora_A["default"].weight.data = torch.zeros(
        3, 32
    )
    with pytest.raises(ValueError, match="same r and target_modules"):
        load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("form", ["full", "slim"])
def test_truncated_files_are_refused_by_name(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    model, processor = build(lora=True)
    folder = save(model, processor, tmp_path, form)
    for file in folder.rglob("*.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(OSError, match=file.name):
            AutoModel.from_pretrained(folder, **options(form, backbone_folder()))
        file.write_bytes(whole)


@pytest.mark.parametrize("form", ["full", "slim"])
def test_another_catalog_is_refused(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    model, processor = build()
    folder = save(model, processor, tmp_path, form)
    users = folder / "user_ids.jsonl"
    users.write_text(users.read_text() + '{"id": "u99"}\n')
    with pytest.raises(OSError, match=r"user_ids\.jsonl"):
        AutoModel.from_pretrained(folder, **options(form, backbone_folder()))


def test_a_cf_table_of_another_catalog_is_refused(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, processor = build()
    folder = save(model, processor, tmp_path, "slim")
    file = folder / "cf_embeddings.safetensors"
    save_file(load_file(file), file, {"ids_fingerprint": "another"})
    with pytest.raises(OSError, match=r"cf_embeddings\.safetensors"):
        AutoModel.from_pretrained(folder, backbone=str(backbone_folder()))


@pytest.mark.parametrize("name", ["cf_embeddings.safetensors", "fusion.safetensors"])
def test_a_newer_format_is_refused_in_one_sentence(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    model, processor = build()
    folder = save(model, processor, tmp_path, "slim")
    file = folder / name
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format_version"] == "2"
    # What else a newer version changes must not be complained of first.
    tensors = {"weights": torch.zeros(1)}
    save_file(tensors, file, metadata | {"format_version": "3", "ids_fingerprint": "another"})
    with pytest.raises(OSError, match=rf"{name} has format version 3, .* newer ccf-llm-hf") as one:
        AutoModel.from_pretrained(folder, backbone=str(backbone_folder()))
    assert "\n" not in str(one.value)
    with pytest.raises(InputError, match=rf"{name} has format version 3"):
        load_checkpoint(str(folder), backbone=str(backbone_folder()))
    if name == "fusion.safetensors":
        with pytest.raises(OSError, match="has format version 3"):
            load_trained_weights(model, folder)


@pytest.mark.parametrize("form", ["full", "slim"])
def test_missing_weights_are_refused_by_name(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    model, processor = build()
    folder = save(model, processor, tmp_path, form)
    file = folder / ("model.safetensors" if form == "full" else "fusion.safetensors")
    tensors = load_file(file)
    del tensors["model.gate.linear.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(OSError, match=r"gate\.linear\.bias"):
        AutoModel.from_pretrained(folder, **options(form, backbone_folder()))


def test_another_backbone_is_refused_unless_named(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, processor = build()
    folder = save(model, processor, tmp_path / "saved", "slim")
    other = AutoModelForCausalLM.from_pretrained(backbone_folder())
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"backbone_name": str(tmp_path / "other")})
    )
    with pytest.raises(ValueError, match="not those that this checkpoint was trained on"):
        AutoModel.from_pretrained(folder)
    with pytest.warns(UserWarning, match="attached because backbone= names it"):
        AutoModel.from_pretrained(folder, backbone=str(tmp_path / "other"))


def test_the_name_of_a_copy_in_the_cache_is_a_backbone(
    build: BuildModel,
    backbone_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = build()
    model.config.backbone_name, model.config.backbone_revision = "acme/Tiny-LM", "v1"
    folder = save(model, processor, tmp_path / "saved", "slim")
    monkeypatch.setenv("CCF_LLM_CACHE", str(tmp_path))
    (tmp_path / "tiny-lm").symlink_to(backbone_folder())
    loaded = AutoModel.from_pretrained(folder, backbone="tiny-lm")
    torch.testing.assert_close(logits(loaded, processor), logits(model, processor))
    fresh = CCFLLMForCTR.from_backbone("tiny-lm", processor)
    assert fresh.config.backbone_fingerprint == model.config.backbone_fingerprint
    (tmp_path / "tiny-lm").unlink()
    asked: list[Any] = []

    def fetch(name: str, revision: str | None = None, **_: Any) -> None:
        asked.append((name, revision))
        raise OSError("no network")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fetch)
    for name in ("tiny-lm", "acme/Tiny-LM", None, "acme/other"):
        with pytest.raises(OSError, match="no network"):
            AutoModel.from_pretrained(folder, backbone=name)
    assert asked == [("acme/Tiny-LM", "v1")] * 3 + [("acme/other", None)]


def test_an_assets_name_is_fetched_by_the_package(
    build: BuildModel,
    backbone_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = build()
    folder = save(model, processor, tmp_path, "slim")
    monkeypatch.setattr(assets, "get_asset", lambda name, **_: backbone_folder())
    loaded, _ = load_checkpoint(str(folder), backbone="smollm2-135m-instruct")
    torch.testing.assert_close(logits(loaded, processor), logits(model, processor))


def test_a_missing_backbone_is_named_with_the_mend(build: BuildModel, tmp_path: Path) -> None:
    model, processor = build()
    folder = save(model, processor, tmp_path, "slim")
    with pytest.raises(OSError, match=r"nowhere.*backbone=FOLDER"):
        AutoModel.from_pretrained(folder, backbone=str(tmp_path / "nowhere"))


def test_a_merged_model_has_a_slim_form_by_the_adapter_beside_it(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, processor = build(lora=True)
    folder = save(model, processor, tmp_path / "full", "full")
    slim = save(AutoModel.from_pretrained(folder), processor, tmp_path / "slim", "slim")
    loaded = AutoModel.from_pretrained(slim, backbone=str(backbone_folder()))
    torch.testing.assert_close(
        logits(loaded, processor), logits(model, processor), atol=1e-5, rtol=0
    )
    shutil.rmtree(folder / "adapter")  # as release 0.2 wrote it
    with pytest.raises(ValueError, match="LoRA is merged"):
        AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "two", form="slim")


@pytest.mark.parametrize("form", ["full", "slim"])
def test_checkpoints_load_in_bfloat16_and_keep_the_tables_exact(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    model, processor = build(lora=True, cf_logit=True)
    folder = save(model, processor, tmp_path, form)
    place = options(form, backbone_folder())
    loaded = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, **place)
    assert loaded.cf.item_known.dtype == torch.bool
    assert torch.equal(loaded.cf.item_vectors, model.cf.item_vectors)
    torch.testing.assert_close(
        logits(loaded, processor), logits(model, processor), atol=0.2, rtol=0.1
    )


def test_a_given_backbone_is_left_as_it_was(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, processor = build(lora=True)
    folder = save(model, processor, tmp_path, "slim")
    causal = AutoModelForCausalLM.from_pretrained(backbone_folder())
    first = AutoModel.from_pretrained(folder, backbone=causal)
    second = AutoModel.from_pretrained(folder, backbone=causal)
    torch.testing.assert_close(logits(first, processor), logits(second, processor))


def test_a_slim_checkpoint_tells_its_loading_info(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, processor = build()
    folder = save(model, processor, tmp_path, "slim")
    loaded, info = AutoModel.from_pretrained(
        folder, backbone=backbone_folder(), output_loading_info=True
    )
    assert not info["missing_keys"]
    torch.testing.assert_close(logits(loaded, processor), logits(model, processor))
