"""What others can open without this package: the adapter by PEFT, the CF table by safetensors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, inject_adapter_in_model
from safetensors import safe_open
from tiny import BACKBONES, BuildModel
from transformers import AutoModelForCausalLM

from ccf_llm_hf import CCFLLMForCTR, CFVectors
from ccf_llm_hf.modeling.adapter_ccf_llm import injected_parts


def our_deltas(model: CCFLLMForCTR) -> dict[str, torch.Tensor]:
    """`scale * B @ A` of every adapted module, as `(out, in)`."""
    parts = injected_parts(model.language_model)
    return {path: scale * up @ down for path, ((down, up, scale),) in parts.items()}


def peft_deltas(tuned: PeftModel, prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(f"base_model.model.{prefix}."): module.get_delta_weight("default")
        for name, module in tuned.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("kind", BACKBONES)
def test_plain_peft_reads_the_same_lora_deltas(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    model, _ = build(backbone=kind, lora=True)
    model.save_pretrained(tmp_path, form="slim")
    plain = AutoModelForCausalLM.from_pretrained(backbone_folder(kind))
    tuned = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    found = peft_deltas(tuned, model.language_model.base_model_prefix)
    ours = our_deltas(model)
    assert found.keys() == ours.keys()
    conv = kind == "gpt2"  # its Conv1D weights are (in, out)
    for name, delta in ours.items():
        torch.testing.assert_close(found[name], delta.T if conv else delta)


def test_rank_stabilized_lora_has_the_same_scale(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, _ = build()
    lora = {"r": 4, "lora_alpha": 3, "target_modules": ["o_proj"], "use_rslora": True}
    model.config.lora = lora | {"lora_dropout": 0.1}
    inject_adapter_in_model(LoraConfig(**model.config.lora), model.language_model)
    with torch.no_grad():
        for _, weight in model.lora_parameters():
            weight.normal_()
    model.save_pretrained(tmp_path, form="slim")
    plain = AutoModelForCausalLM.from_pretrained(backbone_folder())
    found = peft_deltas(PeftModel.from_pretrained(plain, tmp_path / "adapter"), "model")
    for name, delta in our_deltas(model).items():
        torch.testing.assert_close(found[name], delta)


def test_the_adapter_names_its_backbone(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, _ = build(lora=True)
    model.config.backbone_name = str(backbone_folder())
    model.save_pretrained(tmp_path, form="slim")
    tuned = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert peft_deltas(tuned, "model").keys() == our_deltas(model).keys()


def test_the_cf_table_opens_with_plain_safetensors(
    build: BuildModel, cf: CFVectors, tmp_path: Path
) -> None:
    model, processor = build()
    model.save_pretrained(tmp_path, form="slim")
    processor.save_pretrained(tmp_path)
    with safe_open(tmp_path / "cf_embeddings.safetensors", framework="np") as table:
        metadata = table.metadata()
        tensors = {name: table.get_tensor(name) for name in table.keys()}  # noqa: SIM118
    users = [json.loads(line)["id"] for line in (tmp_path / "user_ids.jsonl").open()]
    items = [json.loads(line)["id"] for line in (tmp_path / "item_catalog.jsonl").open()]
    assert metadata["format_version"] == "2" and metadata["cf_model"] == "mf"
    assert (len(users), len(items), int(metadata["dim"])) == (
        int(metadata["num_users"]),
        int(metadata["num_items"]),
        tensors["item_vectors"].shape[-1],
    )
    user, item = users.index("u1"), items.index("i3")
    logit = tensors["user_vectors"][user] @ tensors["item_vectors"][item] + tensors["offset"]
    np.testing.assert_allclose(logit, cf.logits(["u1"], ["i3"]).numpy()[0], rtol=1e-5)
    assert not tensors["item_known"][items.index("i7")]


def test_a_checkpoints_cf_table_is_a_cf_table(
    build: BuildModel, cf: CFVectors, tmp_path: Path
) -> None:
    model, processor = build()
    model.save_pretrained(tmp_path, form="slim")
    processor.save_pretrained(tmp_path)
    table = CFVectors.load(tmp_path)
    assert table.num_fits == 1
    pairs = (["u0", "u4", "x"], ["i0", "i1", "i7"])
    torch.testing.assert_close(table.logits(*pairs), cf.logits(*pairs))
