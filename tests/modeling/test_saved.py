"""Saved = trained, or refused: every way that weights come to be, by form and reader."""

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
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import BuildModel, inject_lora
from transformers import AutoModel, Trainer, TrainingArguments

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.modeling.checkpoint_ccf_llm import write_json, write_tensors

CALL = {
    "user": "u0",
    "history": ["i1", "i2", "i7"],
    "candidates": ["i0", "i3", "i7", "A new film (2024)"],
}
FORMS = ("full", "slim")


def lora(**settings: Any) -> LoraConfig:
    """A LoRA that changes what is computed, of another rank and scale than the fixtures'."""
    plain = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "init_lora_weights": False}
    return LoraConfig(**plain | settings)


def logits(model: Any, processor: CCFLLMProcessor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**processor(**CALL)).logits.float()


def train(model: Any, processor: CCFLLMProcessor) -> Any:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.5)
    for _ in range(2):
        model(**processor(**CALL, labels=[1, 0, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def add(**settings: Any) -> Callable[..., Any]:
    def change(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
        model.add_adapter(lora(**settings))
        return train(model, processor)

    return change


def wrap(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    return train(get_peft_model(model, lora(modules_to_save=["gate"])), processor).base_model.model


def merge(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    return get_peft_model(model, lora()).merge_and_unload()


def train_fusion(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    model.language_model.requires_grad_(False)
    return train(model, processor)


def add_two(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    model.add_adapter(lora(), "one")
    model.add_adapter(lora(r=2, target_modules=["q_proj", "up_proj"]), "two")
    model.set_adapter(["one", "two"])
    return model


def switch_off(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    model.add_adapter(lora())
    model.disable_adapters()
    return model


def own_lora(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    inject_lora(model)
    return model


def change_last_row(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    model.language_model.layers[2].mlp.down_proj.weight.data[-1] += 1
    return model


def resize(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 8)
    return model


def freeze_backbone_in_bf16(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    for weight in model.language_model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    return model


def round_weights(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    """Weights alone: `model.to` rounds the rotary frequencies too, which no checkpoint holds."""
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16).float()
    return model


WAYS = {
    "as loaded": lambda model, processor: model,
    "fusion trained": train_fusion,
    "LoRA of the own trainer": own_lora,
    "PEFT around the model": wrap,
    "add_adapter": add(),
    "add_adapter, rank-stabilized": add(use_rslora=True),
    "add_adapter, another rank in one layer": add(rank_pattern={"layers.1.self_attn.q_proj": 2}),
    "add_adapter, in every layer": add(target_modules="all-linear"),
    "two adapters": add_two,
    "adapter switched off": switch_off,
    "in bfloat16": lambda model, processor: model.to(torch.bfloat16),
    "in float16": lambda model, processor: model.half(),
}
NO_LONGER_THE_BACKBONE = {
    "merge_and_unload": merge,
    "all weights trained": train,
    "one row changed": change_last_row,
    "vocabulary resized": resize,
    "rounded and back": round_weights,
}
NO_PLAIN_LORA = {
    "DoRA": add(use_dora=True),
    "LoRA in embeddings": add(target_modules=["embed_tokens"]),
    "embeddings learn whole": lambda model, processor: (
        get_peft_model(model, lora(modules_to_save=["embed_tokens"])).base_model.model
    ),
}


@pytest.fixture(params=FORMS)
def base(
    request: pytest.FixtureRequest,
    build: BuildModel,
    backbone_folder: Callable[..., Path],
    tmp_path: Path,
) -> Path:
    """A checkpoint with LoRA, in either form."""
    return save_base(build, backbone_folder, tmp_path / "base", request.param)


def save_base(
    build: BuildModel, backbone_folder: Callable[..., Path], folder: Path, form: str
) -> Path:
    model, processor = build(lora=True, cf_logit=True)
    model.config.backbone_name = str(backbone_folder())
    model.save_pretrained(folder, form=form)
    processor.save_pretrained(folder)
    return folder


def change(base: Path, way: Callable[..., Any]) -> tuple[CCFLLMForCTR, CCFLLMProcessor]:
    torch.manual_seed(0)
    processor = CCFLLMProcessor.from_pretrained(base)
    return way(CCFLLMForCTR.from_pretrained(base), processor), processor


def check_equal(folder: Path, model: CCFLLMForCTR, processor: CCFLLMProcessor) -> None:
    """In half precision LoRA beside the weights is not bit for bit LoRA merged into them."""
    half = any(w.dtype in (torch.bfloat16, torch.float16) for w in model.parameters())
    found = logits(CCFLLMForCTR.from_pretrained(folder), processor)
    tolerance = 3e-2 if half else 1e-4
    torch.testing.assert_close(found, logits(model, processor), atol=tolerance, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_saved_is_what_was_trained(base: Path, tmp_path: Path, way: str) -> None:
    model, processor = change(base, WAYS[way])
    for form in FORMS:
        model.save_pretrained(tmp_path / form, form=form)
        check_equal(tmp_path / form, model, processor)


@pytest.mark.parametrize("way", NO_LONGER_THE_BACKBONE)
def test_another_backbone_is_saved_whole_or_not_at_all(
    base: Path, tmp_path: Path, way: str
) -> None:
    model, processor = change(base, NO_LONGER_THE_BACKBONE[way])
    with pytest.raises(ValueError, match=r"not those that were loaded.*form='full'"):
        model.save_pretrained(tmp_path / "slim", form="slim")
    assert not (tmp_path / "slim").exists()
    model.save_pretrained(tmp_path / "full", form="full")
    check_equal(tmp_path / "full", model, processor)
    with pytest.raises(ValueError, match="form='full'"):  # loaded again, it is known still
        CCFLLMForCTR.from_pretrained(tmp_path / "full").save_pretrained(tmp_path, form="slim")


@pytest.mark.parametrize("way", NO_PLAIN_LORA)
def test_what_no_checkpoint_can_hold_is_refused(base: Path, tmp_path: Path, way: str) -> None:
    model, _ = change(base, NO_PLAIN_LORA[way])
    for form in FORMS:
        with pytest.raises(ValueError, match=r"learns by more than plain LoRA.*merge_and_unload"):
            model.save_pretrained(tmp_path / form, form=form)
        assert not (tmp_path / form).exists()


def test_a_backbone_frozen_in_bfloat16_keeps_its_lora_whole(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, processor = build()
    model.config.backbone_name = str(backbone_folder())
    freeze_backbone_in_bf16(model, processor)
    inject_lora(model)
    for form in FORMS:
        model.save_pretrained(tmp_path / form, form=form)
        check_equal(tmp_path / form, model, processor)


def test_peft_saves_and_loads_around_the_model(base: Path, tmp_path: Path) -> None:
    model, processor = change(base, lambda model, _: get_peft_model(model, lora()))
    model.save_pretrained(tmp_path / "peft")
    again = PeftModel.from_pretrained(CCFLLMForCTR.from_pretrained(base), tmp_path / "peft")
    torch.testing.assert_close(logits(again, processor), logits(model, processor))
    with pytest.raises(OSError, match=r"peft has no config\.json of a CCF-LLM checkpoint"):
        CCFLLMForCTR.from_pretrained(tmp_path / "peft")


REMOTE = """
import json, sys, torch
sys.modules["ccf_llm_hf"] = None  # importing it fails
from peft import LoraConfig
from transformers import AutoModel, AutoProcessor
root, names, call = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
load = lambda name: AutoModel.from_pretrained(f"{root}/{name}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(f"{root}/{names[0]}", trust_remote_code=True)
batch = processor(**call)
with torch.no_grad():
    found = {name: load(name)(**batch).logits.tolist() for name in names}
    for name in names[:2]:
        model = load(name)
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(f"{root}/added")
        again = load("added")(**batch).logits
        torch.testing.assert_close(again, model.eval()(**batch).logits, atol=1e-5, rtol=0)
print("LOGITS", json.dumps(found))
"""


def test_remote_code_reads_and_writes_the_same(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    expected = {}
    for base in FORMS:
        folder = save_base(build, backbone_folder, tmp_path / f"base-{base}", base)
        for number, way in enumerate(WAYS):
            model, processor = change(folder, WAYS[way])
            form = FORMS[(number + (base == "slim")) % 2]
            name = f"{base}-{number}-{form}"
            model.save_pretrained(tmp_path / name, form=form)
            processor.save_pretrained(tmp_path / name)
            expected[name] = logits(CCFLLMForCTR.from_pretrained(tmp_path / name), processor)
    run = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path), json.dumps(list(expected)), json.dumps(CALL)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.split("LOGITS ")[1])
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision_means_the_same_in_both_forms(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, dtype: Any
) -> None:
    states = []
    for form in FORMS:
        folder = save_base(build, backbone_folder, tmp_path / form, form)
        model = CCFLLMForCTR.from_pretrained(folder, dtype=dtype)
        states.append(model.state_dict())
        model.save_pretrained(tmp_path / "again")
        check_equal(tmp_path / "again", model, CCFLLMProcessor.from_pretrained(folder))
    full, slim = states
    assert full.keys() == slim.keys()
    assert all(full[n].dtype == slim[n].dtype and torch.equal(full[n], slim[n]) for n in full)


@pytest.mark.parametrize("form", FORMS)
def test_two_saves_are_the_same_bytes(build: BuildModel, tmp_path: Path, form: str) -> None:
    model, processor = build(lora=True)
    contents = []
    for number in range(4):  # safetensors draws an order each time
        model.save_pretrained(tmp_path / str(number), form=form)
        processor.save_pretrained(tmp_path / str(number))
        if number == 1:
            model.save_pretrained(tmp_path / "between", form="full")
        files = sorted(file for file in (tmp_path / str(number)).rglob("*") if file.is_file())
        contents.append([(file.name, file.read_bytes()) for file in files])
    assert all(content == contents[0] for content in contents)


def test_an_unknown_form_is_refused(build: BuildModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="form='slin' is unknown: choose full or slim"):
        build()[0].save_pretrained(tmp_path, form="slin")


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "bert", "hidden_size": 8}'])
def test_a_folder_of_something_else_builds_nothing(tmp_path: Path, config: str | None) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(OSError, match=rf"{tmp_path} has no config\.json of a CCF-LLM checkpoint"):
        CCFLLMForCTR.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "ccf_llm"}')
    with pytest.raises(OSError, match=r"has no config\.json of a CCF-LLM checkpoint"):
        AutoModel.from_pretrained(tmp_path)


def test_nan_in_a_checkpoint_is_refused_by_name(base: Path) -> None:
    for file in sorted(base.rglob("*.safetensors")):
        whole = file.read_bytes()
        tensors = load_file(file)
        name = next(name for name, value in tensors.items() if value.is_floating_point())
        for bad in (float("nan"), float("-inf")):
            tensors[name].view(-1)[-1] = bad
            save_file(tensors, file, {"format": "pt"})
            with pytest.raises(OSError, match=rf"holds NaN or infinity in '{name}'"):
                CCFLLMForCTR.from_pretrained(base)
        file.write_bytes(whole)


@pytest.mark.parametrize("damage", ["rank", "half", "module", "scale"])
def test_another_adapter_is_refused_by_name(base: Path, damage: str) -> None:
    file = base / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_A" in name)
    other = first.replace("lora_A", "lora_B")
    if damage == "rank":
        tensors = {n: torch.cat([w, w], dim=int("lora_B" in n)) for n, w in tensors.items()}
    elif damage == "half":
        del tensors[first]
    elif damage == "module":
        del tensors[first], tensors[other]
    else:
        settings = file.with_name("adapter_config.json")
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 99}))
    save_file(tensors, file, {"format": "pt"})
    name = r"adapter_config\.json" if damage == "scale" else r"adapter_model\.safetensors"
    with pytest.raises(OSError, match=name):
        CCFLLMForCTR.from_pretrained(base)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"row": row}


def plain_trainer(model: CCFLLMForCTR, processor: CCFLLMProcessor, folder: Path) -> Trainer:
    aucs = iter([0.9, 0.1, 0.1])
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=3,
        learning_rate=0.1,
        optim="sgd",  # Adam would make steps of what is rounding alone
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="auc",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(
        model,
        arguments,
        data_collator=lambda rows: dict(processor(**CALL, labels=[1, 0, 1, 0])),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        compute_metrics=lambda _: {"auc": next(aucs)},
    )


def fusion_learns(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    model.language_model.requires_grad_(False)
    return model


def adapter_learns(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> CCFLLMForCTR:
    model.add_adapter(lora())
    return model


@pytest.mark.parametrize(
    ("base", "prepare"),
    [
        ("full", fusion_learns),
        ("slim", fusion_learns),
        ("slim", adapter_learns),
        ("full", WAYS["as loaded"]),
        ("slim", WAYS["as loaded"]),  # everything learns: its checkpoints are full ones
    ],
    indirect=["base"],
)
def test_a_plain_trainer_loads_its_best_weights_and_resumes(
    base: Path, tmp_path: Path, prepare: Callable[..., Any]
) -> None:
    model, processor = change(base, prepare)
    plain_trainer(model, processor, tmp_path / "run").train()
    check_equal(tmp_path / "run" / "checkpoint-1", model, processor)  # the best
    last = tmp_path / "run" / "checkpoint-3"
    expected = logits(CCFLLMForCTR.from_pretrained(last), processor)
    assert (logits(model, processor) - expected).abs().max() > 1e-3
    shutil.rmtree(last)
    fresh, _ = change(base, prepare)
    resumed = plain_trainer(fresh, processor, tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    found = logits(CCFLLMForCTR.from_pretrained(last), processor)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_merged_weights_are_not_loaded_beside_lora(base: Path, tmp_path: Path) -> None:
    model, _ = change(base, add())
    model.save_pretrained(tmp_path / "full", form="full")
    with pytest.raises(ValueError, match=r"LoRA merged into it.*from_pretrained"):
        model.load_state_dict(load_file(tmp_path / "full" / "model.safetensors"), strict=False)


@pytest.mark.parametrize("form", FORMS)
def test_saved_files_follow_the_umask_and_nothing_is_left_beside(
    build: BuildModel, tmp_path: Path, form: str
) -> None:
    model, processor = build(lora=True)
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "saved", form=form)
        processor.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "saved").rglob("*") if file.is_file()]
    assert {oct(file.stat().st_mode & 0o777) for file in files if file.suffix != ".py"} == {"0o640"}
    assert not [file for file in files if file.name.startswith(".")]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    whole = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(3)}, {"a": 1})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [whole]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
