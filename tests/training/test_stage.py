import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig

from ccf_llm_hf import CTRRanker
from ccf_llm_hf.cf.folds import fold_of
from ccf_llm_hf.data.prepare import PrepareConfig, prepare
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR, CCFLLMModel
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.training.collator import PackingCollator
from ccf_llm_hf.training.lora import inject_lora
from ccf_llm_hf.training.recipe import Recipe, Stage
from ccf_llm_hf.training.stage import RunInputs, StageRun, uses_bf16
from ccf_llm_hf.training.trainer import group_split, sample_users

TEXT = {"preset": "text_only", "lora": {}}


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


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-10, 10), (0, 100)])
def test_signed_histories_of_ratings_of_any_scale_can_be_packed(
    settings, data_dir, tmp_path, low, high
):
    table = pd.read_csv(data_dir.parent / "rows.csv")
    draw = np.random.default_rng(0).random(len(table))
    table["rating"] = low + (high - low) * (table["label"] + draw) / 2
    table.to_csv(tmp_path / "rows.csv", index=False)
    config = PrepareConfig(
        "table",
        str(tmp_path / "data"),
        interactions=str(tmp_path / "rows.csv"),
        rating_column="rating",
        positive_threshold=(low + high) / 2,
        histories="signed",
    )
    top = settings | {"data_dir": str(prepare(config, summary=False))}
    stage = Stage(name="any")
    recipe = Recipe(**top, output_dir="unused", stages=[stage])
    run = StageRun(recipe, stage, RunInputs.load(recipe), tmp_path, None)
    processor = run.build_processor()
    split = run.inputs.data.splits["train"]
    groups = group_split(split, processor)
    targets = processor.pack(groups)["history_targets"]
    assert targets.min() >= 0 and targets.max() <= 1 and targets.isfinite().all()
    for group in groups:
        labels = {item["id"]: item["rating"] >= (low + high) / 2 for item in group.history}
        assert [processor.likes(item) for item in group.history] == list(labels.values())


def test_training_rows_see_earlier_snapshots_only(stage_run, inputs):
    times = np.asarray(inputs.data.splits["train"]["timestamp"])
    trainer = stage_run().build_trainer()
    assert {group.fit for group in trainer.train_groups} == {0, 1}
    for group in trainer.train_groups:
        assert (inputs.cf.snapshot_times[group.fit].item() <= times[group.rows]).all()
    assert {group.fit for group in trainer.eval_groups} == {-1}


def test_training_rows_see_the_table_that_leaves_their_fold_out(stage_run, inputs, monkeypatch):
    last = inputs.cf.snapshot_times[-1:].expand(3)
    monkeypatch.setattr(inputs, "cf", replace(inputs.cf, cross_fit="folds", snapshot_times=last))
    trainer = stage_run().build_trainer()
    split = inputs.data.splits["train"].to_pandas()
    folds = fold_of(split["user_id"], split["item_id"], 2)
    assert {group.fit for group in trainer.train_groups} == {0, 1}
    for group in trainer.train_groups:
        assert (folds[group.rows] == group.fit).all()
    assert {group.fit for group in trainer.eval_groups} == {-1}


def test_rows_after_every_snapshot_see_the_last(stage_run, inputs, monkeypatch):
    early = replace(inputs.cf, snapshot_times=torch.tensor([0, 1, 2]))
    monkeypatch.setattr(inputs, "cf", early)
    assert {group.fit for group in stage_run().build_trainer().train_groups} == {-1}


def test_a_text_only_stage_sees_no_fit(stage_run):
    assert {group.fit for group in stage_run(**TEXT).build_trainer().train_groups} == {-1}
    taught = stage_run(**TEXT, training={"cf_distillation": 0.5}).build_trainer()
    assert {group.fit for group in taught.train_groups} == {0, 1}


def test_samples_of_training_and_validation(stage_run):
    run = stage_run(training={"max_train_labels": 60, "max_eval_labels": 20})
    trainer = run.build_trainer()
    assert 60 <= sum(len(group.labels) for group in trainer.train_groups) < 60 + 32
    assert list(trainer.train_groups) == list(run.build_trainer().train_groups)
    split = run.inputs.data.splits["validation"]
    everything = group_split(split, trainer.processing_class, 64)
    sample = list(trainer.eval_groups)
    users = {group.user for group in sample}
    assert sample == [group for group in everything if group.user in users]
    assert 20 <= sum(len(group.labels) for group in sample) < len(everything) * 32
    assert sample_users(everything, 0, seed=0) == everything


@pytest.mark.parametrize("wording", ["shared_prefix", "question_last"])
def test_labels_share_a_row_unless_told_otherwise(stage_run, wording):
    prompt = {"wording": wording}
    trainer = stage_run(prompt=prompt, **TEXT).build_trainer()
    assert max(len(group.labels) for group in trainer.train_groups) > 1
    alone = stage_run(prompt=prompt, training={"max_candidates": 1}, **TEXT).build_trainer()
    assert {len(group.labels) for group in alone.train_groups} == {1}


def test_histories_of_another_kind_are_refused(stage_run):
    with pytest.raises(InputError, match="prepare it with --histories signed"):
        stage_run(prompt={"histories": "signed"}).build_processor()
    with pytest.raises(InputError, match="`cf_fold_in` needs signed histories"):
        stage_run(model={"cf_logit": True, "cf_fold_in": True}).build_processor()


def validation_batch(run, processor):
    split = run.inputs.data.splits["validation"]
    return PackingCollator(processor)(group_split(split, processor, 64)[:4])


def test_stage_two_starts_from_stage_ones_adapter(stage_run, tmp_path):
    first = stage_run(**TEXT)
    processor = first.build_processor()
    model = first.build_trainer().model
    trained = fill_lora(model)
    source = save_slim(trained, processor, tmp_path / "first")

    trainer = stage_run(start=source).build_trainer()
    second = trainer.model.eval()
    assert second.config.lora["r"] == 8
    batch = validation_batch(first, processor)
    with torch.no_grad():
        torch.testing.assert_close(second(**batch).logits, trained.eval()(**batch).logits)
    assert not any(parameter.requires_grad for _, parameter in second.lora_parameters())


def test_lora_of_the_start_learns_on_with_a_section(stage_run, tmp_path):
    first = stage_run(**{**TEXT, "lora": {"r": 4, "target_modules": ["q_proj", "o_proj"]}})
    processor = first.build_processor()
    trained = fill_lora(first.build_trainer().model)
    slim = save_slim(trained, processor, tmp_path / "first")
    for source in (slim, slim / "adapter"):  # a bare PEFT folder is a start too
        second = stage_run(start=source, lora={"lora_dropout": 0.3}).build_trainer().model
        found = dict(second.lora_parameters())
        assert found.keys() == {name for name, _ in trained.lora_parameters()}
        assert all(torch.equal(found[name], p) for name, p in trained.lora_parameters())
        assert all(p.requires_grad for p in found.values())
        assert (second.config.lora["r"], second.config.lora["lora_dropout"]) == (4, 0.3)


def shifted(run, folder):
    """A checkpoint of the run's model with other fusion weights than fresh ones."""
    processor = run.build_processor()
    model = run.build_model(processor)
    with torch.no_grad():
        for _, parameter in [*model.fusion_parameters(), *model.head_parameters()]:
            parameter.add_(0.1)
    return model, save_slim(model, processor, folder)


def test_the_same_fusion_takes_its_weights_along(stage_run, tmp_path):
    first, source = shifted(stage_run(), tmp_path / "first")
    second = stage_run(start=source, lora={})
    model = second.build_model(second.build_processor())
    same = dict([*model.fusion_parameters(), *model.head_parameters()])
    named = [*first.fusion_parameters(), *first.head_parameters()]
    assert all(torch.equal(same[name], p) for name, p in named)
    with pytest.raises(InputError, match="init_from"):
        stage_run(start=tmp_path).settings()


@pytest.mark.parametrize("sections", [{"model": {"fusion": "sum"}}, {"preset": "text_only"}])
def test_other_slots_or_none_leave_the_fusion_fresh(stage_run, tmp_path, sections):
    _, source = shifted(stage_run(**sections), tmp_path / "first")
    for run in (stage_run(start=source), stage_run()):
        torch.manual_seed(0)
        model = run.build_model(run.build_processor())
        named = dict([*model.fusion_parameters(), *model.head_parameters()])
        if run.start:
            expected = named
    assert all(torch.equal(named[name], value) for name, value in expected.items())


def test_lora_on_missing_modules_is_an_input_error(stage_run):
    run = stage_run()
    model = run.build_model(run.build_processor())
    with pytest.raises(InputError, match="LoRA"):
        inject_lora(model, LoraConfig(r=2, lora_alpha=4, target_modules=["nowhere"]))


def test_a_stage_leaves_a_checkpoint_that_scores_the_same(stage_run):
    from accelerate import PartialState

    run = stage_run(lora={})
    record = run.run(PartialState(cpu=True))
    assert record["finished"]
    assert record["trains"] == ["fusion", "lora"]
    assert record["settings"]["lora"]["target_modules"] == ["q_proj", "v_proj"]
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
    run = stage_run(lora={}, top={"precision": "bf16"})
    trainer = run.build_trainer()
    model = trainer.model
    kinds = {p.requires_grad: p.dtype for p in model.language_model.parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert {p.dtype for _, p in model.fusion_parameters()} == {torch.float32}
    output = model(**trainer.data_collator(trainer.train_groups[:2]))
    output.loss.backward()
    assert output.logits.dtype == torch.float32
    assert all(p.grad.abs().sum() > 0 for n, p in model.lora_parameters() if "lora_B" in n)


def test_a_kill_while_a_changed_stage_is_deleted_leaves_no_weights_without_a_record(
    stage_run, monkeypatch
):
    run = stage_run(top={"rerun_changed": True})
    run.folder.mkdir()
    (run.folder / "stage.json").write_text('{"settings": {}, "finished": true}')
    (run.folder / "checkpoint").mkdir()

    def killed(folder, ignore_errors=False):
        if not ignore_errors:
            (folder / "stage.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("ccf_llm_hf.training.stage.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.check_unchanged()
    assert not run.folder.exists()
    monkeypatch.undo()
    run.check_unchanged()
    assert not list(run.folder.parent.glob(".deleted-*"))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("items/items.parquet", "items"),
        ("protocol.json", "items"),
        ("cf/item_catalog.jsonl", "CF catalog"),
        ("backbone/tokenizer.json", "backbone files"),
        ("backbone/model.safetensors", "backbone files"),
    ],
)
def test_another_input_is_another_stage(stage_run, settings, tmp_path, file, name):
    """Not only rows and vectors: titles, prompts and the backbone decide what is learned, too."""
    places = {"data_dir": "data", "cf_dir": "cf", "backbone": "backbone"}
    copies = {key: shutil.copytree(settings[key], tmp_path / at) for key, at in places.items()}
    given = settings | {key: str(copied) for key, copied in copies.items()}
    run = stage_run(top=given)
    before = RunInputs.load(run.recipe).digest
    assert before == run.inputs.digest
    changed = tmp_path / (file if file.startswith(("cf/", "backbone/")) else f"data/{file}")
    content = changed.read_bytes()
    if changed.suffix == ".parquet":
        table = pq.read_table(changed)
        titles = pa.array(["Another title"] * len(table))
        pq.write_table(
            table.set_column(table.schema.get_field_index("title"), "title", titles), changed
        )
    elif changed.suffix == ".safetensors":
        changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        changed.write_bytes(content + b"\n")
    if changed.suffix == ".jsonl":
        changed.write_bytes(content.replace(b"Film", b"film", 1))
    after = RunInputs.load(run.recipe).digest
    assert {key for key in before if before[key] != after[key]} == {name}


def test_what_an_older_record_does_not_tell_counts_as_unchanged(stage_run):
    run = stage_run()
    run.folder.mkdir()
    known = {key: value for key, value in run.settings().items() if key != "backbone files"}
    for settings, refused in ((known, False), ({**known, "seed": 7}, True)):
        record = {"settings": settings, "finished": False}
        (run.folder / "stage.json").write_text(json.dumps(record))
        if refused:
            with pytest.raises(InputError, match="was trained with another seed; name another"):
                run.check_unchanged()
        else:
            run.check_unchanged()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha_pattern": {"q_proj": 99}}, r"adapter: lora: alpha_pattern=.*leave it out"),
        ({"use_dora": True}, r"adapter: lora: use_dora=True"),
        ({"peft_type": "IA3"}, "not LoRA"),
    ],
)
def test_an_adapter_that_is_more_than_plain_lora_is_no_start(stage_run, tmp_path, change, message):
    first = stage_run(**TEXT)
    model = fill_lora(first.build_trainer().model)
    slim = save_slim(model, first.build_processor(), tmp_path / "first")
    file = slim / "adapter" / "adapter_config.json"
    settings = stage_run(start=slim).settings()
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    changed = stage_run(start=slim, lora={})
    assert changed.settings()["starting settings"] != settings["starting settings"]
    with pytest.raises(InputError, match=message):
        changed.build_model(changed.build_processor())


@pytest.mark.parametrize("flag", [{"push_to_hub": True}, {"report_to": "no_such_tracker"}])
def test_what_cannot_be_reached_is_told_before_the_first_step(stage_run, monkeypatch, flag):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    training = flag | ({"hub_model_id": "acme/films"} if "push_to_hub" in flag else {})
    run = stage_run(training=training)
    with pytest.raises(InputError, match=r"stage 'stage' cannot begin: ") as refused:
        run.build_trainer()
    assert "\n" not in str(refused.value)


def test_a_stage_reads_the_catalog_once_trains_on_it_and_ranks_what_nobody_knows(
    stage_run, text_cache, monkeypatch
):
    run = stage_run(lora={}, model={"cf_logit": True})
    run.run(PartialState(cpu=True))
    shards = list(text_cache.glob("*.safetensors"))
    assert len(shards) == 1
    folder = run.folder / "checkpoint"
    loaded = CCFLLMForCTR.from_pretrained(folder, backbone=run.inputs.backbone)
    assert loaded.config.item_text == "contextual"
    fresh = run.build_model(run.build_processor())
    old, new = (dict(m.model.text_alignment.named_parameters()) for m in (fresh, loaded))
    assert all((old[name] != new[name]).any() for name in new)
    processor = CCFLLMProcessor.from_pretrained(folder)
    rows = torch.arange(len(processor.item_ids))
    assert torch.equal(loaded.text_vectors(rows), fresh.text_vectors(rows))
    ranked = CTRRanker(loaded, processor).rank(
        user="u0", history=["i1"], candidates=["i2", "A film of tomorrow"]
    )
    assert {item.item_id for item in ranked} == {"i2", None}

    def read_again(*args):
        raise AssertionError("the catalog was read before")

    monkeypatch.setattr(CCFLLMModel, "read_texts", read_again)
    run.build_model(run.build_processor())
    plain = stage_run(model={"item_text": "static"})
    assert plain.build_model(plain.build_processor()).config.item_text == "static"
