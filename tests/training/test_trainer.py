import copy
import json
import math
import re
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig
from transformers import TrainerCallback

from ccf_llm_hf import CTRTrainer, CTRTrainingArguments
from ccf_llm_hf.data.grouping import group_split
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.ranking_ccf_llm import score
from ccf_llm_hf.training.resume import last_checkpoint, train_or_resume
from ccf_llm_hf.training.stage import StageRun
from ccf_llm_hf.training.trainer import (
    Scores,
    check_classes,
    check_lengths,
    choose_temperature,
    gate_statistics,
)
from ccf_llm_hf.training.warm_start import load_trained_weights

OFTEN = {"eval_strategy": "steps", "eval_steps": 2}  # validate every 64 labels


def joint(
    run: Any, folder: str = "run", lora: dict[str, Any] | None = None, **training: Any
) -> Any:
    """A stage run that trains everything, validating often."""
    return run(folder, lora=lora or {}, training={**OFTEN, **training})


def make_trainer(run: StageRun) -> CTRTrainer:
    run.folder.mkdir(parents=True, exist_ok=True)
    return run.build_trainer()


def weights(model: Any) -> dict[str, torch.Tensor]:
    named = [*model.fusion_parameters(), *model.lora_parameters()]
    return {name: parameter.detach().clone() for name, parameter in named}


class Interruption(Exception):
    pass


class InterruptAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Interruption


def test_accumulation_gives_the_weights_of_one_large_batch(stage_run):
    # Validated once, at the end: an earlier best checkpoint would be loaded instead.
    once = {"labels_per_step": 64, "eval_strategy": "epoch", "eval_steps": None}
    large = make_trainer(joint(stage_run, "large", tokens_per_batch=100_000, **once))
    small = make_trainer(joint(stage_run, "small", tokens_per_batch=20, **once))
    assert large.batch_sampler.accumulation == large.args.gradient_accumulation_steps == 1
    assert small.batch_sampler.accumulation == small.args.gradient_accumulation_steps >= 8
    before = weights(large.model)
    large.train()
    small.train()
    after = weights(large.model)
    for name, value in weights(small.model).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-4, msg=name)
    moved = max((after[name] - before[name]).abs().max() for name in after)
    assert moved > 1e-3


def test_loss_of_a_step_is_the_mean_over_its_labels(stage_run):
    trainer = make_trainer(joint(stage_run))
    loader = iter(trainer.get_train_dataloader())
    batches, count = trainer.get_batch_samples(
        loader, trainer.batch_sampler.accumulation, trainer.args.device
    )
    labels = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches])
    assert count == len(labels)
    logits = torch.cat(
        [trainer.model(**batch).logits[batch["labels"] != -100] for batch in batches]
    )
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    total = sum(
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count) for batch in batches
    )
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("stop", [3, 6, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(stage_run, stop):
    # Dropout and early stopping carry state of their own; step 6 is the end of the first epoch.
    def run(folder):
        lora = {"lora_dropout": 0.2}
        return joint(stage_run, folder, lora, num_train_epochs=2, early_stopping_patience=3)

    whole = make_trainer(run("whole"))
    history = train_or_resume(whole)

    broken = make_trainer(run("broken"))
    broken.add_callback(InterruptAt(stop))
    with pytest.raises(Interruption):
        train_or_resume(broken)
    assert last_checkpoint(run("broken").folder) is not None
    resumed = make_trainer(run("broken"))
    assert train_or_resume(resumed)[-1]["step"] == history[-1]["step"]

    for name, value in weights(resumed.model).items():
        assert torch.equal(value, weights(whole.model)[name]), name
    assert resumed.state.best_metric == whole.state.best_metric
    aucs = [entry["eval_auc"] for entry in resumed.state.log_history if "eval_auc" in entry]
    assert aucs == [entry["eval_auc"] for entry in history if "eval_auc" in entry]


def test_a_run_that_ended_is_not_trained_on(stage_run):
    trainer = make_trainer(joint(stage_run, num_train_epochs=1.5))
    train_or_resume(trainer)
    again = make_trainer(joint(stage_run, num_train_epochs=1.5))
    again.train = lambda **_: pytest.fail("trained on")
    history = train_or_resume(again)
    assert history == trainer.state.log_history[:-1]  # but for the closing speed entry
    for name, value in weights(again.model).items():
        assert torch.equal(value, weights(trainer.model)[name]), name


def test_a_checkpoint_cut_short_is_passed_over(stage_run):
    run = joint(stage_run)
    make_trainer(run).train()
    latest = last_checkpoint(run.folder)
    (latest / "trainer_state.json").write_text('{"epoch": ')
    earlier = last_checkpoint(run.folder)
    assert earlier is not None
    assert earlier != latest


def test_the_best_validation_is_what_remains(stage_run):
    rates = {"learning_rate": 0.05, "learning_rate_mapping": {"gate": 2e-4}}
    trainer = make_trainer(joint(stage_run, num_train_epochs=3, **rates))
    history = train_or_resume(trainer)
    evaluations = [entry for entry in history if "eval_auc" in entry]
    best = max(evaluations, key=lambda entry: entry["eval_auc"])
    assert best["step"] != evaluations[-1]["step"], "the case needs a best that is not the last"
    assert trainer.state.best_global_step == best["step"]
    scores = trainer.score(trainer.eval_groups)
    assert scores.metrics()["auc"] == best["eval_auc"]
    assert trainer.model.config.logit_temperature == best["eval_temperature"]


def test_what_its_checkpoints_could_not_hold_is_refused_before_training(stage_run, tmp_path):
    run = joint(stage_run)
    trainer = make_trainer(run)
    trainer.save_model(str(tmp_path))
    for change, message in (
        (lambda model: None, "would get a second one on top: train by a recipe with init_from"),
        (
            lambda model: model.get_input_embeddings().weight.data.add_(1),
            "could not hold the model",
        ),
    ):
        model = CCFLLMForCTR.from_pretrained(tmp_path, backbone=run.inputs.backbone)
        change(model)
        with pytest.raises(InputError, match=message):
            CTRTrainer(
                model,
                processing_class=trainer.processing_class,
                peft_config=run.stage.lora_config(),
                cf=run.inputs.cf,
            )


def test_trainer_checkpoints_are_slim_and_load_alone(stage_run):
    run = joint(stage_run)
    trainer = make_trainer(run)
    trainer.train()
    checkpoint = last_checkpoint(run.folder)
    assert not (checkpoint / "model.safetensors").exists()
    assert not (checkpoint / "training_args.bin").exists()
    load_trained_weights(trainer.model, checkpoint)
    model = CCFLLMForCTR.from_pretrained(checkpoint)
    batch = trainer.data_collator(trainer.eval_groups[:4])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-5)


def test_each_part_has_its_own_learning_rate_and_decay(stage_run):
    mapping = {"lora_": 1e-4, "gate": 2e-4, "answer_scale|cold_user": 1e-3}
    training = {"learning_rate": 1e-2, "learning_rate_mapping": mapping, "weight_decay": 0.1}
    lora = {"target_modules": ["q_proj", "gate_proj"]}
    run = stage_run(training=training, lora=lora, model={"cf_logit": True})
    trainer = make_trainer(run)
    trainer.create_optimizer()
    places = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    own = {
        "model.gate.linear.weight": 2e-4,
        "model.gate.linear.bias": 2e-4,
        "model.gate.evidence_weight": 2e-4,
        "answer_scale": 1e-3,
        "model.cold_user": 1e-3,
    }
    trained = trainer.model.fusion_parameters() + trainer.model.head_parameters()
    assert own.keys() <= {name for name, _ in trained}
    for name, parameter in trained:
        rate = own.get(name, 1e-2)
        assert places.pop(id(parameter)) == (rate, 0.1 if parameter.ndim > 1 else 0.0), name
    # The first pattern found holds: a gate of the language model's is no gate of the fusion.
    assert any(".gate_proj." in name for name, _ in trainer.model.lora_parameters())
    for name, parameter in trainer.model.lora_parameters():
        assert places.pop(id(parameter)) == (1e-4, 0.1), name
    assert not places


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({}, {"fusion"}),
        ({"lora": {}}, {"fusion", "lora"}),
        ({"preset": "text_only", "lora": {}}, {"lora"}),
        ({"preset": "concat"}, {"fusion"}),
    ],
)
def test_only_the_chosen_parts_change(stage_run, sections, parts):
    run = stage_run(**sections)
    assert set(run.stage.trains()) == parts
    trainer = make_trainer(run)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    model = trainer.model
    of_part = {"fusion": model.fusion_parameters(), "lora": model.lora_parameters()}
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    for part, named in of_part.items():
        assert bool(changed & {name for name, _ in named}) == (part in parts), part
    trained = {name for part in parts for name, _ in of_part[part]}
    assert changed <= trained | {name for name, _ in model.head_parameters()}


def test_gate_statistics_and_speed_are_logged(stage_run):
    trainer = make_trainer(joint(stage_run))
    trainer.train()
    evaluation = next(entry for entry in trainer.state.log_history if "eval_auc" in entry)
    assert 0 < evaluation["eval_gate_mean"] < 1
    assert evaluation["eval_gate_std"] > 0
    speeds = [e["labels_per_second"] for e in trainer.state.log_history if "loss" in e]
    assert speeds
    assert min(speeds) > 0


def test_fusions_without_a_gate_have_no_gate_statistics(stage_run):
    run = stage_run(model={"fusion": "sum"})
    assert gate_statistics(run.build_model(run.build_processor())) == {}


def test_a_text_only_stage_logs_no_gate(stage_run):
    trainer = make_trainer(stage_run(preset="text_only", lora={}))
    assert not [key for key in trainer.evaluate() if "gate" in key]


@pytest.mark.parametrize("fusion", ["scalar_gate", "sum", "cf_only"])
def test_every_fusion_trains(stage_run, fusion):
    trainer = make_trainer(stage_run(model={"fusion": fusion, "cf_logit": fusion == "sum"}))
    before = weights(trainer.model)
    history = train_or_resume(trainer)
    assert any(not torch.equal(v, before[n]) for n, v in weights(trainer.model).items())
    assert json.dumps(history)


def test_distillation_draws_the_targets_to_the_cf_models_probabilities(stage_run):
    trainer = make_trainer(stage_run(training={"cf_distillation": 0.9}))
    batch = next(iter(trainer.get_train_dataloader()))
    plain, taught = dict(batch), batch
    valid = batch["labels"] != -100
    logits = trainer.model.eval()(**batch).logits[valid]
    cf = trainer.model.cf_logits(
        *(batch[name] for name in ("candidate_users", "candidate_items", "answer_positions")),
        batch["sequence_ids"],
        batch["history_depths"],
    )
    targets = 0.1 * batch["labels"][valid] + 0.9 * torch.sigmoid(cf)[valid]
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    loss = trainer.compute_loss(trainer.model, taught)
    torch.testing.assert_close(loss, bce(logits, targets))
    assert torch.equal(plain["labels"], batch["labels"]), "the batch itself stays as it is"
    trainer.args.cf_distillation = 0.0
    assert not torch.isclose(trainer.compute_loss(trainer.model, plain), loss)
    trainer.args.label_smoothing_factor = 0.2
    smooth = bce(logits, 0.8 * batch["labels"][valid] + 0.1)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, plain), smooth)


def direct(run: StageRun, **options: Any) -> CTRTrainer:
    """A trainer as a user builds it, without a recipe."""
    processor = run.build_processor()
    splits = run.inputs.data.splits
    given = {"cf": run.inputs.cf, "peft_config": None, "args": run.training_arguments()}
    given |= {"train_dataset": splits["train"], "eval_dataset": splits["validation"]}
    return CTRTrainer(
        run.build_model(processor),
        processing_class=processor,
        **given | options,
    )


def test_evaluate_and_predict_take_splits(stage_run):
    run = stage_run()
    trainer = direct(run)
    test = run.inputs.data.splits["test"]
    before = trainer.model.config.logit_temperature
    metrics = trainer.evaluate(test, metric_key_prefix="test")
    assert trainer.model.config.logit_temperature == before, "fitted on validation alone"
    output = trainer.predict(test)
    assert output.label_ids.tolist() == test["label"]
    assert output.metrics["test_auc"] == metrics["test_auc"]
    row = test[5]
    batch = trainer.processing_class(
        user=row["user_id"], history=row["history"], candidates=[row["item_id"]]
    )
    with torch.no_grad():
        alone = trainer.model.eval()(**batch).logits[0, 0].item()
    assert output.predictions[5] == pytest.approx(alone, abs=1e-4)


def test_lora_that_cannot_be_saved_is_refused(stage_run):
    for config, name in (
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora"),
        (LoraConfig(target_modules=["q_proj"], rank_pattern={"0": 2}), "rank_pattern"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights"),
    ):
        with pytest.raises(InputError, match=name):
            direct(stage_run(), peft_config=config)


def test_bad_combinations_are_refused_in_one_sentence(stage_run):
    run = stage_run()
    with pytest.raises(InputError, match="give cf=, with which each row sees"):
        direct(run, cf=None)
    folder = str(run.folder)
    for change in ({"gradient_accumulation_steps": 4}, {"per_device_train_batch_size": 8}):
        with pytest.raises(InputError, match=r"the batch sampler decides.*labels_per_step"):
            direct(run, args=CTRTrainingArguments(output_dir=folder, **change))
    with pytest.raises(InputError, match="needs processing_class"):
        CTRTrainer(run.build_model(run.build_processor()))
    with pytest.raises(InputError, match=r"eval_steps=5 counts with eval_strategy: steps only"):
        CTRTrainingArguments(output_dir=folder, eval_steps=5)


def test_flags_of_transformers_work(stage_run):
    training = {"activation_checkpointing": True, "optim": "adafactor", "max_steps": 2}
    trainer = make_trainer(joint(stage_run, **training, dataloader_num_workers=1))
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 2
    assert type(trainer.optimizer.optimizer).__name__ == "Adafactor"
    assert any(not torch.equal(v, before[n]) for n, v in weights(trainer.model).items())
    assert trainer.state.log_history[0]["loss"] > 0, "a short run logs its loss too"


def test_activation_checkpointing_changes_no_gradient(stage_run):
    gradients = []
    for activations in (False, True):
        trainer = make_trainer(joint(stage_run, activation_checkpointing=activations, max_steps=1))
        trainer.train()
        gradients.append(weights(trainer.model))
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_what_is_pushed_is_the_slim_checkpoint(stage_run, monkeypatch, strategy):
    class Hub:
        """What `huggingface_hub.HfApi` does for a trainer, on paper."""

        def __init__(self):
            self.sent = []

        def create_repo(self, name, **_):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, folder_path, **_):
            files = {str(f.relative_to(folder_path)) for f in Path(folder_path).rglob("*")}
            self.sent.append({f for f in files if not f.startswith("checkpoint-")})
            done: Future = Future()
            done.set_result(None)
            return done

    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer = make_trainer(
        joint(stage_run, push_to_hub=True, hub_model_id="films", hub_strategy=strategy)
    )
    trainer.train()
    assert bool(hub.sent) == (strategy == "every_save")
    trainer.push_to_hub()
    needed = {
        "config.json",
        "fusion.safetensors",
        "cf_embeddings.safetensors",
        "adapter/adapter_model.safetensors",
        "processor_config.json",
        "modeling_ccf_llm.py",
    }
    assert all(needed <= files for files in hub.sent)
    assert "README.md" in hub.sent[-1]


def test_a_folder_that_is_no_trainer_checkpoint_is_named(stage_run, tmp_path):
    trainer = make_trainer(joint(stage_run))
    with pytest.raises(InputError, match="is no trainer checkpoint: name a folder checkpoint-N"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def damages(file: Path) -> list[bytes | None]:
    """A file cut in half, one of something else, and none."""
    other = file.with_name("other")
    torch.save({"another": torch.ones(2)}, other)
    return [file.read_bytes()[: file.stat().st_size // 2], other.read_bytes(), None]


def test_a_damaged_file_of_a_trainer_checkpoint_is_named(stage_run, tmp_path, caplog):
    run = joint(stage_run)
    broken = make_trainer(run)
    broken.add_callback(InterruptAt(3))
    with pytest.raises(Interruption):
        broken.train()
    whole = last_checkpoint(Path(broken.args.output_dir))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        for content in damages(whole / name):
            checkpoint = shutil.copytree(whole, tmp_path / "copy" / whole.name)
            if content is None:
                (checkpoint / name).unlink()
            else:
                (checkpoint / name).write_bytes(content)
            either = "optimizer.pt or scheduler.pt" if name.endswith(".pt") else name
            with pytest.raises(InputError) as raised:
                make_trainer(run).train(resume_from_checkpoint=str(checkpoint))
            assert re.fullmatch(
                rf"{checkpoint}/({name}|{either}) cannot be read \(.+\): restore it, or delete the "
                rf"folder {checkpoint} to go on from the checkpoint before it",
                str(raised.value),
            )
            shutil.rmtree(checkpoint)
    shutil.copytree(whole, whole.with_name("checkpoint-9"))
    (whole.with_name("checkpoint-9") / "trainer_state.json").write_text("{")
    assert last_checkpoint(whole.parent) == whole
    assert "checkpoint-9/trainer_state.json was not written to its end" in caplog.text


def test_a_pattern_that_names_no_parameter_is_pointed_out(stage_run):
    trainer = make_trainer(joint(stage_run, learning_rate_mapping={"zzz": 1e-3}))
    with pytest.warns(UserWarning, match="'zzz' is found in no parameter"):
        trainer.create_optimizer()


def test_validation_rows_that_measure_nothing_are_refused_before_training(stage_run, inputs):
    validation = inputs.data.splits["validation"]
    likes = validation.select(np.flatnonzero(validation["label"]))
    with pytest.raises(InputError, match="hold no label but 1, so that no AUC can choose"):
        direct(stage_run(), eval_dataset=likes)


def test_a_uauc_that_is_undefined_is_left_out_of_the_logs(stage_run, monkeypatch):
    trainer = make_trainer(stage_run())
    by_class = {0: "x", 1: "y"}
    scores = trainer.score(trainer.eval_groups)
    users = np.array([by_class[label] for label in scores.labels.tolist()])
    trainer.score = lambda groups: replace(scores, users=users)
    metrics = trainer.evaluate()
    assert "eval_uauc" not in metrics and 0 <= metrics["eval_auc"] <= 1
    check_classes(trainer.eval_groups, "eval_uauc")
    split = trainer.eval_groups.split
    by_user = (split.user_names[split.users] < "u3").astype(np.int8)
    monkeypatch.setattr(split, "labels", by_user)
    with pytest.raises(InputError, match="no user of the validation rows has both classes"):
        check_classes(trainer.eval_groups, "eval_uauc")
    trainer.log({"grad_norm": math.nan, "loss": 1.0})
    assert "grad_norm" not in trainer.state.log_history[-1]


@pytest.mark.parametrize("logits", [[5.0, -5.0], [-5.0, 5.0]])
def test_a_temperature_at_its_bound_is_told_and_not_used(caplog, logits):
    found = [np.array(values) for values in ([0, 1], ["a", "b"], [1, 0], logits)]
    assert choose_temperature(Scores(*found)) == 1.0
    assert "ends at the bound" in caplog.text
    draw = np.random.default_rng(0)
    logits = draw.normal(size=500)
    labels = (draw.random(500) < 1 / (1 + np.exp(-logits))).astype(int)
    rows = np.arange(500)
    scores = Scores(rows, rows.astype(str), labels, 3 * logits)
    assert choose_temperature(scores) == pytest.approx(3, rel=0.3)


def test_prompts_longer_than_the_backbones_positions_are_refused_before_training(stage_run):
    run = stage_run()
    processor = run.build_processor()
    model = run.build_model(processor)
    group = group_split(run.inputs.data.splits["validation"], processor)[-1]
    longest = int(processor.pack([group])["position_ids"].max()) + 1
    model.config.text_config.max_position_embeddings = longest
    items = [*group.history, "i1"]
    long = replace(group, history=items, history_lengths=[len(items)] * len(group.candidates))
    for check in (
        lambda groups: check_lengths(
            model, processor, groups, [processor.count_tokens(one) for one in groups]
        ),
        lambda groups: score(model, processor, groups),
    ):
        check([group])
        with pytest.raises(ValueError, match=f"tokens, and the backbone {longest} positions: give"):
            check([group, long])


def test_a_training_that_would_never_be_validated_or_never_end_is_refused(stage_run):
    often = {"eval_strategy": "steps", "eval_steps": 10**6}
    with pytest.raises(InputError, match="eval_steps=1000000 is more than the 6 steps"):
        stage_run(training=often).run(PartialState())
    with pytest.raises(InputError, match="max_steps=1000000000 is more than 1000 passes"):
        stage_run(training={"max_steps": 10**9}).build_trainer()


DAMAGES = {
    "config.json": b'{"model_type": "llama", "hidden_size": "x"}',
    "tokenizer.json": b'{"version": 3}',
    "tokenizer_config.json": b"[]",
    "model.safetensors": b"\0" * 100,
}


@pytest.mark.parametrize("file", ["misspelled", *DAMAGES])
def test_a_backbone_that_cannot_be_read_is_one_sentence(stage_run, inputs, tmp_path, file):
    folder = tmp_path / "backbone"
    shutil.copytree(inputs.backbone, folder)
    name = str(tmp_path / "nowhere") if file == "misspelled" else str(folder)
    if file in DAMAGES:
        (folder / file).write_bytes(DAMAGES[file])
    run = replace(stage_run(), inputs=replace(inputs, backbone=name))
    with pytest.raises(InputError, match=name) as problem:
        run.build_trainer()
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 700
