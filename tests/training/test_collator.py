import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ccf_llm_hf.training.collator import (
    GroupDataset,
    PackingCollator,
    TokenBudgetBatchSampler,
    balance,
)

SIZES = st.lists(st.tuples(st.integers(5, 300), st.integers(1, 32)), min_size=1, max_size=60)


def size(batch: list[int], lengths: list[int]) -> int:
    return sum(lengths[i] for i in batch)


@given(SIZES, st.integers(1, 12))
def test_balance_makes_the_asked_number_of_parts(sizes, parts):
    lengths = [length for length, _ in sizes]
    batches = balance(range(len(lengths)), lengths, parts)
    assert len(batches) == min(parts, len(lengths))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))


@given(SIZES, st.integers(100, 1000), st.integers(1, 3), st.integers(0, 3))
def test_an_epoch_sees_every_group_once_within_the_budget(sizes, budget, world_size, epoch):
    lengths, labels = [list(column) for column in zip(*sizes, strict=True)]
    ranks = []
    for rank in range(world_size):
        sampler = TokenBudgetBatchSampler(
            lengths,
            labels,
            labels_per_step=64,
            tokens_per_batch=budget,
            epochs=4,
            rank=rank,
            world_size=world_size,
        )
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
        assert len(sampler) == sampler.steps_per_epoch * sampler.accumulation
    batches = list(itertools.chain(*ranks))
    seen = [index for batch in batches for index in batch if index >= 0]
    assert sorted(seen) == list(range(len(lengths)))
    assert all(len(batch) == 1 or size(batch, lengths) <= budget for batch in batches)


def test_steps_hold_about_the_asked_labels_whatever_budget_and_ranks():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 400, (400,), generator=generator).tolist()
    labels = torch.randint(1, 33, (400,), generator=generator).tolist()

    def steps(budget: int, world_size: int) -> list[set[int]]:
        shares = []
        for rank in range(world_size):
            sampler = TokenBudgetBatchSampler(
                lengths,
                labels,
                labels_per_step=192,
                tokens_per_batch=budget,
                rank=rank,
                world_size=world_size,
            )
            size = sampler.accumulation
            batches = list(sampler)
            shares.append([batches[i : i + size] for i in range(0, len(batches), size)])
        return [
            {i for share in step for batch in share for i in batch if i >= 0}
            for step in zip(*shares, strict=True)
        ]

    reference = steps(100_000, 1)
    counts = [sum(labels[i] for i in step) for step in reference]
    assert all(abs(count - 192) <= 32 for count in counts)
    assert steps(1024, 1) == reference
    assert steps(512, 3) == reference


def test_batches_are_nearly_full():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(30, 120, (300,), generator=generator).tolist()
    sampler = TokenBudgetBatchSampler(
        lengths, [16] * 300, labels_per_step=1024, tokens_per_batch=1024
    )
    sizes = [size(batch, lengths) for batch in sampler if batch[0] >= 0]
    assert sum(sizes) / len(sizes) > 0.85 * 1024


def test_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = TokenBudgetBatchSampler(
            [10] * 50, [4] * 50, labels_per_step=20, tokens_per_batch=40, seed=seed
        )
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


@pytest.mark.parametrize("form", ["slot", "title_slot", "title"])
def test_token_counts_are_those_of_the_built_rows(stage_run, form):
    trainer = stage_run(prompt={"history_format": form, "candidate_format": form}).build_trainer()
    processor = trainer.processing_class
    for group in trainer.train_groups[:10]:
        row = len(processor.prompt.instruction()) + processor.count_tokens(group)
        assert trainer.data_collator([group])["input_ids"].shape == (1, row)


def test_a_masked_group_has_no_labels_and_no_loss(stage_run):
    trainer = stage_run().build_trainer()
    dataset, model, collate = GroupDataset(trainer.train_groups), trainer.model, PackingCollator
    collator = collate(trainer.processing_class)
    batch = collator([dataset[~0], dataset[0]])
    count = len(dataset[0].labels)
    assert (batch["labels"] != -100).sum() == count
    both = model(**batch, num_items_in_batch=count).loss
    alone = collator([dataset[0]])
    torch.testing.assert_close(both, model(**alone, num_items_in_batch=count).loss)
