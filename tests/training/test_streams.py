"""Training on answered histories: streams learn, plain groups are scored."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from ccf_llm_hf.cf import MFConfig, fit_mf
from ccf_llm_hf.cf.folds import fold_of_users
from ccf_llm_hf.data.grouping import group_split
from ccf_llm_hf.data.prepare import PrepareConfig, prepare
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.ranking_ccf_llm import score
from ccf_llm_hf.training.collator import GroupDataset
from ccf_llm_hf.training.recipe import Recipe, Stage
from ccf_llm_hf.training.resume import train_or_resume
from ccf_llm_hf.training.run import run_recipe
from ccf_llm_hf.training.stage import RunInputs, StageRun

TRAIN = Path(__file__).parents[2] / "examples" / "train.py"
FORMS = {"history_format": "title", "candidate_format": "title"}
ANSWERED = {"wording": "answered", "history_window": [8, 1], **FORMS}
FOLDED = {"cf_logit": True, "cf_fold_in": True}
SMALL = {"labels_per_step": 32, "tokens_per_batch": 512, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module")
def settings(
    settings: dict[str, Any], data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The tiny world, with signed histories."""
    config = PrepareConfig(
        source="table",
        interactions=str(data_dir.parent / "rows.csv"),
        label_column="label",
        ratios=[0.6, 0.2, 0.2],
        histories="signed",
        out=str(tmp_path_factory.mktemp("signed") / "prepared"),
    )
    return settings | {"data_dir": str(prepare(config, summary=False))}


@pytest.fixture(scope="module")
def inputs(settings: dict[str, Any]) -> RunInputs:
    return RunInputs.load(Recipe(**settings, output_dir="unused", stages=[Stage(name="any")]))


def answered(run: Any, folder: str = "run", prompt: dict | None = None, **sections: Any) -> Any:
    made = run(folder, **{"lora": {}, "prompt": ANSWERED | (prompt or {}), **sections})
    made.folder.mkdir(parents=True, exist_ok=True)
    return made


def test_some_streams_hide_their_dislikes(stage_run):
    shares = {}
    for share in (0.0, 0.4, 1.0):
        trainer = answered(
            stage_run, f"hide{share}", training=SMALL | {"likes_only_share": share}
        ).build_trainer()
        for stream in trainer.train_groups:
            assert stream.hidden in (None, [not label for label in stream.labels])
        hiding = [stream.hidden is not None for stream in trainer.train_groups]
        shares[share] = sum(hiding) / len(hiding)
    assert shares[0.0] == 0 and shares[1.0] == 1 and 0.1 < shares[0.4] < 0.7


def test_training_rows_are_lines_and_validation_rows_candidates(stage_run):
    trainer = answered(stage_run).build_trainer()
    streams, split = trainer.train_groups, trainer.train_dataset
    assert all(stream.stream for stream in streams)
    assert max(len(stream.history) for stream in streams) == 8
    assert sorted(row for stream in streams for row in stream.rows) == list(range(len(split)))
    assert not any(group.stream for group in trainer.eval_groups)
    assert GroupDataset(streams)[~0].labels == [-100] * len(streams[0].rows)
    assert all(stream.hidden is None for stream in streams)
    batch = trainer.data_collator(streams[:3])
    assert batch["labels"].shape == batch["answer_positions"].shape
    loss = trainer.compute_loss(trainer.model, batch)
    logits = score(trainer.model, trainer.processing_class, streams[:3])
    labels = torch.tensor([label for stream in streams[:3] for label in stream.labels])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.cat(logits), labels.float()
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["title", "slot"])
def test_training_meets_a_row_as_evaluation_does(stage_run, form):
    forms = dict.fromkeys(FORMS, form)
    run = answered(stage_run, prompt={"history_window": [20, 1], **forms})
    warned = pytest.warns(UserWarning, match="CF fits") if form == "slot" else nullcontext()
    with warned:
        trainer = run.build_trainer()
    processor = trainer.processing_class
    groups = group_split(trainer.train_dataset, processor, 64)
    lines, rows = (
        {
            row: logit
            for one, logits in zip(some, score(trainer.model, processor, some), strict=True)
            for row, logit in zip(one.rows, logits.tolist(), strict=True)
        }
        for some in (trainer.train_groups, groups)
    )
    assert lines == pytest.approx(rows, abs=1e-4)


def test_folds_of_users_give_each_stream_one_fit(settings, tmp_path, recwarn):
    strengths = {"l2_factors": 2.0, "l2_user_bias": 1.0, "l2_item_bias": 1.0}
    config = MFConfig(dim=2, folds=3, cross_fit="users", **strengths)
    fit_mf(settings["data_dir"], config).save(tmp_path / "cf")
    stage = Stage(name="s", prompt=ANSWERED, lora={}, model=FOLDED, training=SMALL)
    recipe = Recipe(**settings | {"cf_dir": str(tmp_path / "cf")}, output_dir="o", stages=[stage])
    inputs = RunInputs.load(recipe)
    run = StageRun(recipe, stage, inputs, tmp_path / "run", None)
    streams = run.build_trainer().train_groups
    fits = {group.user: group.fit for group in streams}
    assert len({*fits.values()}) == 3
    for group in streams:
        assert group.fit == fits[group.user] == fold_of_users([group.user], 3)[0]
    assert not [w for w in recwarn if "several CF fits" in str(w.message)]
    stage.model = {"cf_logit": True}
    with pytest.raises(InputError, match="cross-fit by users"):
        run.build_trainer()


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_resumed_run_equals_an_uninterrupted_one(stage_run):
    def build(folder):
        lora = {"lora_dropout": 0.2}
        return answered(stage_run, folder, lora=lora, training=SMALL).build_trainer()

    whole = build("whole")
    before = [weight.detach().clone() for _, weight in whole.model.lora_parameters()]
    history = train_or_resume(whole)
    broken = build("broken")
    broken.add_callback(StopAt())
    with pytest.raises(KeyboardInterrupt):
        train_or_resume(broken)
    resumed = build("broken")
    assert train_or_resume(resumed)[-1]["step"] == history[-1]["step"]
    learned = dict(whole.model.lora_parameters())
    for name, value in resumed.model.lora_parameters():
        assert torch.equal(value, learned[name]), name
    moved = [(a - b).abs().max() for a, b in zip(learned.values(), before, strict=True)]
    assert max(moved) > 5e-4


def test_two_ranks_train_the_weights_of_one(settings, tmp_path):
    training = SMALL | {"tokens_per_batch": 100, "max_steps": 4}
    stage = {"name": "words", "prompt": ANSWERED, "lora": {}, "training": training}
    results = []
    for ranks in (1, 2):
        output = tmp_path / f"run{ranks}"
        file = tmp_path / f"run{ranks}.yaml"
        recipe = {**settings, "cf_dir": "", "output_dir": str(output), "stages": [stage]}
        file.write_text(yaml.safe_dump(recipe))
        if ranks == 1:
            run_recipe(["--config", str(file)])
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", "2", str(TRAIN), "--config", str(file)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
        report = json.loads((output / "training.json").read_text())
        assert report["hardware"]["processes"] == ranks
        slim = output / "checkpoint-slim" / "adapter" / "adapter_model.safetensors"
        results.append(load_file(slim))
    for name, value in results[1].items():
        torch.testing.assert_close(value, results[0][name], rtol=0, atol=1e-4, msg=name)


def test_answered_lines_of_two_formats_are_refused_in_one_sentence(stage_run):
    run = answered(stage_run, prompt={"history_format": "slot"})
    with pytest.raises(InputError, match="stage 'stage': history_format='slot' and"):
        run.build_processor()
