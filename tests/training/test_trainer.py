import copy
import json
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.training.stage import StageRun
from ccf_llm_hf.training.trainer import CCFLLMTrainer, gate_statistics, last_checkpoint

JOINT: dict[str, Any] = {"train": ["fusion", "lora"], "eval_every_labels": 64}


def make_trainer(run: StageRun) -> CCFLLMTrainer:
    run.folder.mkdir(parents=True, exist_ok=True)
    return run.trainer(PartialState(cpu=True))


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
    config = {**JOINT, "labels_per_step": 64, "eval_every_labels": 0}
    large = make_trainer(stage_run("large", top={"tokens_per_batch": 100_000}, **config))
    small = make_trainer(stage_run("small", top={"tokens_per_batch": 20}, **config))
    assert large.batch_sampler.accumulation == 1
    assert small.batch_sampler.accumulation >= 8
    before = weights(large.model)
    large.train()
    small.train()
    after = weights(large.model)
    for name, value in weights(small.model).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-4, msg=name)
    moved = max((after[name] - before[name]).abs().max() for name in after)
    assert moved > 1e-3


def test_loss_of_a_step_is_the_mean_over_its_labels(stage_run):
    trainer = make_trainer(stage_run(**JOINT))
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
    config = {**JOINT, "epochs": 2, "lora_dropout": 0.2, "early_stopping_patience": 3}
    whole = make_trainer(stage_run("whole", **config))
    history = whole.train_or_resume()

    broken = make_trainer(stage_run("broken", **config))
    broken.add_callback(InterruptAt(stop))
    with pytest.raises(Interruption):
        broken.train_or_resume()
    assert last_checkpoint(stage_run("broken").folder) is not None
    resumed = make_trainer(stage_run("broken", **config))
    assert resumed.train_or_resume()[-1]["step"] == history[-1]["step"]

    for name, value in weights(resumed.model).items():
        assert torch.equal(value, weights(whole.model)[name]), name
    assert resumed.state.best_metric == whole.state.best_metric
    aucs = [entry["eval_auc"] for entry in resumed.state.log_history if "eval_auc" in entry]
    assert aucs == [entry["eval_auc"] for entry in history if "eval_auc" in entry]


def test_a_run_that_ended_is_not_trained_on(stage_run):
    config = {**JOINT, "epochs": 1.5}
    trainer = make_trainer(stage_run(**config))
    trainer.train_or_resume()
    again = make_trainer(stage_run(**config))
    again.train = lambda **_: pytest.fail("trained on")
    history = again.train_or_resume()
    assert history == trainer.state.log_history[:-1]  # but for the closing speed entry
    for name, value in weights(again.model).items():
        assert torch.equal(value, weights(trainer.model)[name]), name


def test_a_checkpoint_cut_short_is_passed_over(stage_run):
    run = stage_run(**JOINT)
    make_trainer(run).train()
    latest = last_checkpoint(run.folder)
    (latest / "trainer_state.json").write_text('{"epoch": ')
    earlier = last_checkpoint(run.folder)
    assert earlier is not None
    assert earlier != latest


def test_the_best_validation_is_what_remains(stage_run):
    run = stage_run(**JOINT, epochs=3, fusion_learning_rate=0.05, lora_learning_rate=0.05)
    trainer = make_trainer(run)
    history = trainer.train_or_resume()
    evaluations = [entry for entry in history if "eval_auc" in entry]
    best = max(evaluations, key=lambda entry: entry["eval_auc"])
    assert best["step"] != evaluations[-1]["step"], "the case needs a best that is not the last"
    assert trainer.state.best_global_step == best["step"]
    scores = trainer.score(trainer.eval_dataset.groups)
    assert scores.metrics()["auc"] == best["eval_auc"]
    assert trainer.model.config.logit_temperature == best["eval_temperature"]


def test_trainer_checkpoints_are_slim_and_load_alone(stage_run):
    run = stage_run(**JOINT)
    trainer = make_trainer(run)
    trainer.train()
    checkpoint = last_checkpoint(run.folder)
    assert not (checkpoint / "model.safetensors").exists()
    assert not (checkpoint / "training_args.bin").exists()
    trainer.model.load_trained_weights(checkpoint)
    model = CCFLLMForCTR.from_pretrained(checkpoint)
    batch = trainer.data_collator(trainer.eval_dataset.groups[:4])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("answer", [0.0, 1e-3])
def test_each_part_has_its_own_learning_rate_and_decay(stage_run, answer):
    rates = {"fusion_learning_rate": 1e-2, "lora_learning_rate": 1e-4, "weight_decay": 0.1}
    rates["answer_learning_rate"] = answer
    trainer = make_trainer(stage_run(train=["fusion", "lora"], cf_logit=True, **rates))
    trainer.create_optimizer()
    places = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    gate = {name for name, _ in trainer.model.gate_parameters()}
    assert gate
    own = dict.fromkeys(gate, trainer.stage.gate_learning_rate) | {"answer_scale": answer or 1e-2}
    for name, parameter in trainer.model.fusion_parameters() + trainer.model.head_parameters():
        rate = own.get(name, 1e-2)
        assert places.pop(id(parameter)) == (rate, 0.1 if parameter.ndim > 1 else 0.0), name
    for name, parameter in trainer.model.lora_parameters():
        assert places.pop(id(parameter)) == (1e-4, 0.1), name
    assert not places


def test_only_the_chosen_parts_change(stage_run):
    trainer = make_trainer(stage_run(train=["fusion"]))
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    trained = trainer.model.fusion_parameters() + trainer.model.head_parameters()
    fusion = {name for name, _ in trained}
    changed = {
        name
        for name, value in trainer.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed
    assert changed <= fusion


def test_gate_statistics_and_speed_are_logged(stage_run):
    trainer = make_trainer(stage_run(**JOINT))
    trainer.train()
    evaluation = next(entry for entry in trainer.state.log_history if "eval_auc" in entry)
    assert 0 < evaluation["eval_gate_mean"] < 1
    assert evaluation["eval_gate_std"] > 0
    speeds = [e["labels_per_second"] for e in trainer.state.log_history if "loss" in e]
    assert speeds
    assert min(speeds) > 0


def test_arms_without_gate_have_no_gate_statistics(stage_run):
    run = stage_run(fusion="sum")
    assert gate_statistics(run.model(run.processor())) == {}


@pytest.mark.parametrize("fusion", ["scalar_gate", "sum", "concat", "cf_only"])
def test_every_fusion_arm_trains(stage_run, fusion):
    trainer = make_trainer(stage_run(fusion=fusion, cf_logit=fusion == "sum"))
    before = weights(trainer.model)
    history = trainer.train_or_resume()
    assert any(not torch.equal(v, before[n]) for n, v in weights(trainer.model).items())
    assert json.dumps(history)
