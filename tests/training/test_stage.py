from dataclasses import replace

import numpy as np
import pytest
import torch

from ccf_llm_hf.cf.folds import fold_of
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.training.collator import PackingCollator
from ccf_llm_hf.training.stage import inject_lora, sample_users, uses_bf16

TEXT = {"fusion": "text_only", "train": ["lora"]}


def fill_lora(model):
    """Trained-looking LoRA: fresh B matrices are zero and would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.lora_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save_slim(model, processor, folder):
    model.save_pretrained(folder, form="slim")
    processor.save_pretrained(folder)
    return folder


def test_training_rows_see_earlier_snapshots_only(stage_run, inputs):
    run = stage_run()
    times = np.asarray(inputs.data.splits["train"]["timestamp"])
    groups = run.train_groups(run.processor())
    assert {group.snapshot for group in groups} == {0, 1}
    for group in groups:
        assert (inputs.cf.snapshot_times[group.snapshot].item() <= times[group.rows]).all()
    assert {group.snapshot for group in run.eval_groups(run.processor())} == {-1}


def test_training_rows_see_the_table_that_leaves_their_fold_out(stage_run, inputs, monkeypatch):
    last = inputs.cf.snapshot_times[-1:].expand(3)
    monkeypatch.setattr(inputs, "cf", replace(inputs.cf, cross_fit="folds", snapshot_times=last))
    run = stage_run()
    split = inputs.data.splits["train"].to_pandas()
    folds = fold_of(split["user_id"], split["item_id"], 2)
    groups = run.train_groups(run.processor())
    assert {group.snapshot for group in groups} == {0, 1}
    for group in groups:
        assert (folds[group.rows] == group.snapshot).all()
    assert {group.snapshot for group in run.eval_groups(run.processor())} == {-1}


@pytest.mark.parametrize("change", [{"top": {"use_cf_snapshots": False}}, TEXT])
def test_rows_see_the_last_snapshot_when_none_is_asked_for(stage_run, change):
    run = stage_run(**change)
    assert {group.snapshot for group in run.train_groups(run.processor())} == {-1}


def test_samples_of_training_and_validation(stage_run):
    run = stage_run(max_train_labels=60, eval_max_labels=20)
    processor = run.processor()
    train = run.train_groups(processor)
    assert 60 <= sum(len(group.labels) for group in train) < 60 + 32
    assert train == run.train_groups(processor)
    everything = stage_run().eval_groups(processor)
    sample = run.eval_groups(processor)
    users = {group.user_id for group in sample}
    assert sample == [group for group in everything if group.user_id in users]
    assert 20 <= sum(len(group.labels) for group in sample) < len(everything) * 32
    assert sample_users(everything, 0, seed=0) == everything


@pytest.mark.parametrize("wording", ["shared_prefix", "question_last"])
def test_labels_share_a_row_unless_told_otherwise(stage_run, wording):
    run = stage_run(wording=wording, **TEXT)
    assert max(len(group.labels) for group in run.train_groups(run.processor())) > 1
    alone = stage_run(wording=wording, max_candidates=1, **TEXT)
    assert {len(group.labels) for group in alone.train_groups(alone.processor())} == {1}


def test_stage_two_starts_from_stage_ones_adapter(stage_run, tmp_path):
    first = stage_run(**TEXT)
    processor = first.processor()
    trained = fill_lora(first.model(processor))
    source = save_slim(trained, processor, tmp_path / "first")

    second = stage_run(init_folder=source, lora_dropout=0.3).model(processor).eval()
    assert second.config.lora["r"] == 8
    batch = PackingCollator(processor)(first.eval_groups(processor)[:4])
    with torch.no_grad():
        torch.testing.assert_close(second(**batch).logits, trained.eval()(**batch).logits)
    assert not any(parameter.requires_grad for _, parameter in second.lora_parameters())


def test_a_bare_peft_folder_is_a_start_too(stage_run, tmp_path):
    first = stage_run(lora_r=4, lora_target_modules=["q_proj", "o_proj"], **TEXT)
    processor = first.processor()
    trained = fill_lora(first.model(processor))
    source = save_slim(trained, processor, tmp_path / "first") / "adapter"
    second = stage_run(init_folder=source, train=["fusion", "lora"]).model(processor)
    found = dict(second.lora_parameters())
    assert found.keys() == {name for name, _ in trained.lora_parameters()}
    assert all(torch.equal(found[name], p) for name, p in trained.lora_parameters())


def test_the_same_arm_takes_fusion_weights_along(stage_run, tmp_path):
    run = stage_run()
    processor = run.processor()
    first = run.model(processor)
    with torch.no_grad():
        for _, parameter in first.fusion_parameters():
            parameter.add_(0.1)
    source = save_slim(first, processor, tmp_path / "first")
    same = dict(stage_run(init_folder=source, train=["lora"]).model(processor).fusion_parameters())
    assert all(torch.equal(same[name], p) for name, p in first.fusion_parameters())
    with pytest.raises(InputError, match="init_from"):
        stage_run(init_folder=tmp_path).settings()


def test_lora_on_missing_modules_is_an_input_error(stage_run):
    run = stage_run()
    model = run.model(run.processor())
    with pytest.raises(InputError, match="LoRA"):
        inject_lora(model, {"r": 2, "lora_alpha": 4, "target_modules": ["nowhere"]})


def test_a_stage_leaves_a_checkpoint_that_scores_the_same(stage_run):
    from accelerate import PartialState

    run = stage_run(train=["fusion", "lora"])
    record = run.run(PartialState(cpu=True))
    assert record["finished"]
    assert record["validation_labels"] == 64
    assert {file.name for file in run.folder.iterdir()} == {
        "checkpoint",
        "curves.png",
        "log.json",
        "stage.json",
    }
    model = CCFLLMForCTR.from_pretrained(run.folder / "checkpoint")
    assert model.config.logit_temperature == record["validation"]["temperature"]


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_follows_the_hardware(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    assert uses_bf16("auto") is native
    assert uses_bf16("bf16") and not uses_bf16("fp32")


def test_a_bf16_backbone_learns_in_fp32(stage_run):
    run = stage_run(train=["fusion", "lora"])
    run.recipe.precision = "bf16"
    processor = run.processor()
    model = run.model(processor)
    kinds = {p.requires_grad: p.dtype for p in model.language_model.parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert {p.dtype for _, p in model.fusion_parameters()} == {torch.float32}
    batch = PackingCollator(processor)(run.train_groups(processor)[:2])
    output = model(**batch)
    output.loss.backward()
    assert output.logits.dtype == torch.float32
    assert all(p.grad.abs().sum() > 0 for n, p in model.lora_parameters() if "lora_B" in n)
