import time

import pytest

from ccf_llm_hf.data.grouping import group_rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.training.estimate import estimate_recipe, longest_prompt
from ccf_llm_hf.training.memory import peak_memory
from ccf_llm_hf.training.recipe import Recipe

TRIES = 3  # another process may have the machine meanwhile
SMALL = {"labels_per_step": 16, "tokens_per_batch": 256, "num_train_epochs": 6}
STAGES = {
    "text": {"preset": "text_only", "lora": {}},
    "fusion": {"model": {"fusion": "gate"}},
}


def recipe_of(settings, folder, **stages) -> Recipe:
    made = [{"name": name, "training": SMALL, **stage} for name, stage in stages.items()]
    return Recipe(**settings, output_dir=str(folder), stages=made)


@pytest.mark.parametrize("name", STAGES)
def test_minutes_and_memory_are_those_of_the_training(settings, inputs, stage_run, tmp_path, name):
    ratios = []
    for number in range(TRIES):
        (found,) = estimate_recipe(
            recipe_of(settings, tmp_path / "none", **{name: STAGES[name]}), inputs
        )
        trainer = stage_run(f"run{number}", training=SMALL, **STAGES[name]).build_trainer()
        started = time.monotonic()
        trainer.train()
        minutes = (time.monotonic() - started) / 60
        assert found.steps == trainer.state.global_step
        assert found.labels == 6 * sum(trainer.batch_sampler.labels)
        ratios.append((found.train_minutes + found.validation_minutes) / minutes)
        if 0.5 < ratios[-1] < 2:
            break
    else:
        pytest.fail(f"estimates are {ratios} of what the training took")
    assert not (tmp_path / "none").exists()
    assert found.memory_gb is None or peak_memory() < 2 * found.memory_gb
    assert found.minutes == found.train_minutes + found.validation_minutes + found.text_minutes
    assert (found.text_minutes > 0) == (name == "fusion")


def test_a_stage_that_begins_where_another_ends_is_estimated_before_that_one_is_there(
    settings, inputs, tmp_path
):
    second = {"init_from": "text", "lora": {}, **STAGES["fusion"]}
    recipe = recipe_of(settings, tmp_path, text=STAGES["text"], second=second)
    first, then = estimate_recipe(recipe, inputs)
    assert (first.name, then.name) == ("text", "second")
    assert first.tokens_per_label > then.tokens_per_label


def test_tokens_are_counted(settings, inputs, stage_run):
    trainer = stage_run(**STAGES["text"]).build_trainer()
    processor = trainer.processing_class
    groups = [*trainer.train_groups, *trainer.eval_groups]
    alone = max(
        processor.pack([group])["input_ids"].shape[1]
        for name in ("train", "validation")
        for group in group_rows(
            inputs.data.splits[name], processor.history_window, max_candidates=1
        )
    )
    assert longest_prompt(groups, processor) == alone


def test_what_the_run_would_refuse_is_refused(settings, inputs, tmp_path):
    recipe = recipe_of(settings, tmp_path, late={"lora": {}})
    recipe.stages[0].training |= {"eval_strategy": "steps", "eval_steps": 10_000}
    with pytest.raises(InputError, match="eval_steps=10000 is more than"):
        estimate_recipe(recipe, inputs)
