"""What a recipe will take of this machine, measured on a few steps of each stage before it runs."""

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ccf_llm_hf.data.grouping import Group, Groups
from ccf_llm_hf.modeling.modeling_ccf_llm import read_texts
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.training.memory import peak_memory
from ccf_llm_hf.training.recipe import Recipe, Stage
from ccf_llm_hf.training.stage import RunInputs, StageRun
from ccf_llm_hf.training.trainer import CTRTrainer

STEPS = 3  # optimizer steps that are timed
TEXTS = 32  # items of the catalog whose words are read
VALIDATED_TOKENS = 4096  # of validation prompts, at least, where there are so many


@dataclass
class StageEstimate:
    """What a stage will take.

    Attributes:
        name: the stage's.
        labels, steps: of the whole training, all epochs.
        tokens_per_label: of its packed rows.
        longest_prompt: tokens of the longest, training and validation; `positions` is what the
            backbone has, None where it sets no bound.
        train_minutes, validation_minutes: of all epochs and validations.
        text_minutes: of reading the catalog's words for slots, if none of them is cached; 0
            without.
        memory_gb: the most that the process has held so far, the largest pass included (10^9
            bytes); None on Windows.
    """

    name: str
    labels: int
    steps: int
    tokens_per_label: float
    longest_prompt: int
    positions: int | None
    train_minutes: float
    validation_minutes: float
    text_minutes: float
    memory_gb: float | None

    @property
    def minutes(self) -> float:
        """All of it."""
        return self.train_minutes + self.validation_minutes + self.text_minutes


def estimate_recipe(recipe: Recipe, inputs: RunInputs) -> list[StageEstimate]:
    """What each stage of a recipe will take of this process's share of the machine.

    A stage is built as a run builds it, but for weights of earlier stages, which cost nothing, and
    the text vectors of its catalog, which would cost minutes: they are static meanwhile, and a few
    items are read to tell how long all would take. Nothing is written.

    Raises:
        InputError: what the run itself would refuse, such as a prompt longer than the positions.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in recipe.stages:
            static = {k: v for k, v in stage.model.items() if k != "sentence_encoder"}
            light = replace(stage, init_from="", model={**static, "item_text": "static"})
            run = StageRun(recipe, light, inputs, Path(folder) / stage.name, None)
            found.append(_estimate_stage(run, stage))
    return found


def _estimate_stage(run: StageRun, stage: Stage) -> StageEstimate:
    trainer = run.build_trainer()
    run.check_validated(trainer)
    train, validation = trainer.train_groups, trainer.eval_groups
    assert train is not None and validation is not None
    args, sampler = trainer.args, trainer.batch_sampler
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(sampler.steps_per_epoch * args.num_train_epochs)
    validations = math.ceil(args.num_train_epochs)
    if args.eval_strategy == "steps":
        validations = steps // int(args.eval_steps or steps)
    seconds = _time_steps(trainer)
    labels, tokens = sum(sampler.labels), sum(sampler.lengths)
    share = steps / sampler.steps_per_epoch
    return StageEstimate(
        name=stage.name,
        labels=round(labels * share),
        steps=steps,
        tokens_per_label=tokens / labels,
        longest_prompt=max(
            longest_prompt(groups, trainer.processing_class) for groups in (train, validation)
        ),
        positions=getattr(trainer.model.config.text_config, "max_position_embeddings", None),
        train_minutes=seconds * steps / 60,
        validation_minutes=_time_validation(trainer, validation) * validations / 60,
        text_minutes=_time_texts(trainer, stage) / 60,
        memory_gb=peak_memory(),
    )


def _time_steps(trainer: CTRTrainer) -> float:
    """Seconds of an optimizer step, after the largest forward pass of the first epoch, which tells
    the memory."""
    sampler = trainer.batch_sampler
    batches = list(sampler)
    lengths = [sum(sampler.lengths[i] for i in batch if i >= 0) for batch in batches]
    optimizer = trainer.create_optimizer()
    trainer.model.train()
    _learn(trainer, optimizer, [batches[max(range(len(batches)), key=lengths.__getitem__)]])
    taken = []
    for step in range(min(STEPS, sampler.steps_per_epoch)):
        first = step * sampler.accumulation
        started = time.monotonic()
        _learn(trainer, optimizer, batches[first : first + sampler.accumulation])
        taken.append(time.monotonic() - started)
    return statistics.mean(taken)


def _learn(
    trainer: CTRTrainer, optimizer: torch.optim.Optimizer, batches: Sequence[list[int]]
) -> None:
    """One optimizer step, as the trainer does it."""
    dataset = trainer.get_train_dataloader().dataset
    for batch in batches:
        packed = trainer.data_collator([dataset[index] for index in batch])
        inputs = {name: value.to(trainer.model.device) for name, value in packed.items()}
        trainer.compute_loss(
            trainer.model, inputs, num_items_in_batch=trainer.args.labels_per_step
        ).backward()
    learning = [one for one in trainer.model.parameters() if one.requires_grad]
    torch.nn.utils.clip_grad_norm_(learning, trainer.args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def _time_validation(trainer: CTRTrainer, groups: Groups) -> float:
    """Seconds of one validation, by some of its rows."""
    lengths = [trainer.processing_class.count_tokens(group) for group in groups]
    some, tokens = 0, 0
    while some < len(groups) and tokens < VALIDATED_TOKENS:
        tokens += lengths[some]
        some += 1
    started = time.monotonic()
    trainer.score(groups.take(range(some)))
    return (time.monotonic() - started) * sum(lengths) / max(1, tokens)


def _time_texts(trainer: CTRTrainer, stage: Stage) -> float:
    """Seconds of reading the words of the catalog's items, where slots are filled by them."""
    reads = stage.shows_slots() and stage.model.get("item_text", "contextual") == "contextual"
    if not reads or stage.model.get("fusion") == "cf_only" or stage.model.get("sentence_encoder"):
        return 0.0
    texts = trainer.processing_class.item_title_ids()
    some = texts[:: max(1, len(texts) // TEXTS)][:TEXTS]
    backbone = trainer.model.language_model
    layer = stage.model.get("text_layer") or backbone.config.num_hidden_layers // 2
    started = time.monotonic()
    read_texts(backbone, layer, some, trainer.processing_class.text_prefix_ids())
    return (time.monotonic() - started) * len(texts) / len(some)


def longest_prompt(groups: Sequence[Group], processor: CCFLLMProcessor) -> int:
    """Tokens of the longest prompt, a candidate with all before it."""
    shared = len(processor.prompt.instruction())
    lengths = {index: processor.count_tokens(group) for index, group in enumerate(groups)}
    longest = 0
    for index in sorted(lengths, key=lambda i: -lengths[i]):
        if shared + lengths[index] <= longest:  # nor are those after it any longer
            break
        longest = max(longest, int(processor.pack([groups[index]])["position_ids"].max()) + 1)
    return longest
