"""Score many (user, history, candidate) samples: packed groups, batched under a token budget."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ccf_llm_hf.data.grouping import Group, cut_by_budget, group_rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.pipeline_ccf_llm import score_long_row


def processor_inputs(groups: Sequence[Group]) -> dict[str, Any]:
    """The processor's keyword arguments for a batch of groups."""
    return {
        "user": [group.user_id for group in groups],
        "history": [group.history for group in groups],
        "candidates": [group.candidates for group in groups],
        "history_lengths": [group.history_lengths for group in groups],
        "earlier": [group.earlier for group in groups],
        "return_tensors": "pt",
    }


def _score_batch(
    model: Any, processor: Any, groups: Sequence[Group], max_tokens: int
) -> list[np.ndarray]:
    batch = processor(**processor_inputs(groups))
    batch = {key: value.to(model.device) for key, value in batch.items()}
    if len(groups) == 1 and batch["input_ids"].shape[1] > max_tokens:
        return [score_long_row(model, batch, max_tokens).float().cpu().numpy()]
    logits = model(**batch).logits.float().cpu().numpy()
    return [row[: len(group.candidates)] for row, group in zip(logits, groups, strict=True)]


@torch.inference_mode()
def score_groups(
    model: Any,
    processor: Any,
    groups: Sequence[Group],
    *,
    max_tokens_per_batch: int = 2048,
    progress: bool = True,
) -> list[np.ndarray]:
    """Logits of every group's candidates.

    Args:
        model: a `CCFLLMForCTR`; switched to evaluation mode for the call, then back.
        processor: its `CCFLLMProcessor`.
        groups: samples that share a user and a history window.
        max_tokens_per_batch: tokens of a batch, at most. A group longer than that goes through in
            parts: its history once, then its candidates on the history's cached keys and values.
        progress: show a bar that counts labels on stderr.

    Returns:
        One float32 array of shape (number of candidates,) per group, in the order of `groups`. The
        CF vectors are those of the last snapshot.
    """
    scores: dict[int, np.ndarray] = {}
    was_training = model.training
    model.eval()
    try:
        with _labels_bar(groups, progress) as bar:
            lengths = [processor.count_tokens(group) for group in groups]
            for indices in cut_by_budget(range(len(groups)), lengths, max_tokens_per_batch):
                batch = [groups[index] for index in indices]
                for index, logits in zip(
                    indices,
                    _score_batch(model, processor, batch, max_tokens_per_batch),
                    strict=True,
                ):
                    scores[index] = logits
                bar.update(sum(len(group.candidates) for group in batch))
    finally:
        model.train(was_training)
    return [scores[index] for index in range(len(groups))]


def _labels_bar(groups: Sequence[Group], progress: bool) -> "tqdm[Any]":
    total = sum(len(group.candidates) for group in groups)
    return tqdm(total=total, desc="scoring", unit=" labels", disable=not progress)


def score_split(
    model: Any,
    processor: Any,
    split: Dataset,
    *,
    history_window: tuple[int, int],
    max_candidates: int = 512,
    max_tokens_per_batch: int = 2048,
    progress: bool = True,
) -> np.ndarray:
    """Logits of a prepared split's rows, in row order.

    Args:
        model: a `CCFLLMForCTR`.
        processor: its `CCFLLMProcessor`.
        split: rows with `user_id`, `item_id`, `label` and `history` (see `data.load_prepared`).
        history_window: (H, S); with n earlier items the window starts at S * floor(max(0, n-H)/S).
        max_candidates: candidates packed after one shared prefix.
        max_tokens_per_batch: tokens of a batch, at most (but for a single longer group).
        progress: show a bar on stderr.

    Returns:
        Float32 array of shape (rows,).

    Raises:
        InputError: the data's histories hold something else than the model reads.
    """
    stored = "signed" if "history_labels" in split.column_names else "likes"
    if processor.histories != stored:
        raise InputError(
            f"this model reads histories of {processor.histories}, but the data was prepared "
            f"with {stored}: prepare it with --histories {processor.histories}"
        )
    groups = group_rows(
        split,
        history_window=history_window,
        max_candidates=max_candidates,
        fold_in_items=processor.fold_in_items,
    )
    logits = np.full(len(split), np.nan, dtype=np.float32)
    scores = score_groups(
        model, processor, groups, max_tokens_per_batch=max_tokens_per_batch, progress=progress
    )
    for group, values in zip(groups, scores, strict=True):
        logits[group.rows] = values
    return logits
