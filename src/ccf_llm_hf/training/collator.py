"""Packed batches: groups of samples under a token budget, a constant number of labels per step.

The sampler plans whole optimizer steps first and cuts them into forward passes second. What a step
contains therefore depends on neither the token budget nor the number of ranks, and training with
another budget or more ranks gives the same weights (our choice).
"""

import copy
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ccf_llm_hf.data.grouping import Group
from ccf_llm_hf.modeling.configuration_ccf_llm import IGNORED_LABEL
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.training.cross_fit import encode_fits


class GroupDataset(Dataset[Group]):
    """Groups by index. A negative index `~i` gives group i with every label masked out: it evens
    the number of forward passes and adds nothing to loss, gradient or label count."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Group:
        if index >= 0:
            return self.groups[index]
        masked = copy.copy(self.groups[~index])
        masked.labels = [IGNORED_LABEL] * len(masked.rows)
        return masked


class PackingCollator:
    """Groups to model inputs with labels, whose CF table rows carry each group's fit."""

    def __init__(self, processor: CCFLLMProcessor) -> None:
        self.processor = processor

    def __call__(self, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
        return dict(encode_fits(self.processor.pack(groups), groups))


def balance(indices: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Cut groups into at most `parts` batches of similar numbers of tokens; fewer only when there
    are fewer groups. The longest group left goes to the batch that has least so far."""
    heap = [(0, part) for part in range(min(parts, len(indices)))]
    batches: list[list[int]] = [[] for _ in heap]
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        tokens, part = heapq.heappop(heap)
        batches[part].append(index)
        heapq.heappush(heap, (tokens + lengths[index], part))
    return batches


def parts_within(indices: Sequence[int], lengths: Sequence[int], tokens_per_batch: int) -> int:
    """The smallest number of balanced batches that each keep the budget, or hold one group."""
    parts = max(1, -(-sum(lengths[i] for i in indices) // tokens_per_batch))
    while any(
        len(batch) > 1 and sum(lengths[i] for i in batch) > tokens_per_batch
        for batch in balance(indices, lengths, parts)
    ):
        parts += 1
    return parts


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """One rank's batches of one epoch: `accumulation` batches for every optimizer step.

    Every epoch shuffles the groups (seeded), cuts them into steps of about `labels_per_step` labels
    and every step into `accumulation * world_size` batches of similar numbers of tokens.

    Args:
        lengths: tokens of every group.
        labels: number of labels of every group.
        labels_per_step: labels of one optimizer step, over all ranks.
        tokens_per_batch: tokens of one batch, at most (but for a single longer group).
        epochs: epochs that will be run; `accumulation` is what the largest step among them needs.
        seed: order of the groups; with the epoch it determines everything.
        rank, world_size: which share of every step to yield.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        labels: Sequence[int],
        *,
        labels_per_step: int,
        tokens_per_batch: int,
        epochs: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = lengths
        self.labels = labels
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.steps_per_epoch = min(max(1, round(sum(labels) / labels_per_step)), len(lengths))
        self.parts = max(
            parts_within(step, lengths, tokens_per_batch)
            for epoch in range(max(1, epochs))
            for step in self.plan(epoch)
        )
        self.accumulation = -(-self.parts // world_size)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration yields."""
        self.epoch = epoch

    def plan(self, epoch: int) -> list[list[int]]:
        """Groups of every optimizer step of an epoch; each group occurs exactly once."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        target = sum(self.labels) / self.steps_per_epoch
        steps: list[list[int]] = [[]]
        seen = 0
        for position, index in enumerate(order):
            steps[-1].append(index)
            seen += self.labels[index]
            groups_left = len(order) - position - 1
            steps_left = self.steps_per_epoch - len(steps)
            # No step may stay empty: the trainer counts on the same number of steps every epoch.
            if steps_left and (seen >= target * len(steps) or groups_left == steps_left):
                steps.append([])
        return steps

    def __iter__(self) -> Iterator[list[int]]:
        shortest = min(range(len(self.lengths)), key=lambda i: self.lengths[i])
        for step in self.plan(self.epoch):
            total = self.accumulation * self.world_size
            batches = balance(step, self.lengths, total)
            batches += [[~shortest]] * (total - len(batches))
            yield from batches[self.rank :: self.world_size]


class GroupDataLoader(DataLoader[Any]):
    """A DataLoader that passes the epoch on to its batch sampler.

    The sampler already knows its rank, so the loader must not go through `accelerator.prepare`,
    which would shard it again and lose `set_epoch` when a run resumes on several ranks.
    """

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
