"""A small catalog of films behind a tiny random CCF-LLM."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.cf.vectors import CFVectors

TITLES = {
    "1": "Toy Story (1995)",
    "2": "Jumanji (1995)",
    "3": "Heat (1995)",
    "4": "Sabrina (1995)",
    "5": "GoldenEye (1995)",
    "6": "Never rated (1995)",
}
USERS = ["a", "b", "c"]
DIM = 4


def film_table() -> CFVectors:
    """Film 6 is unknown; the last dimension is item bias, which alone is left of a new user."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(1, len(TITLES), DIM, generator=generator)
    users = torch.randn(1, len(USERS), DIM, generator=generator)
    users[..., -1] = 1.0
    items[0, :, -1] = torch.tensor([0.5, 2.0, 1.0, -1.0, 0.0, 0.0])
    return CFVectors(
        user_ids=USERS,
        item_ids=list(TITLES),
        item_titles=list(TITLES.values()),
        user_vectors=users,
        item_vectors=items,
        user_known=torch.ones(1, len(USERS), dtype=torch.bool),
        item_known=torch.tensor([[True] * 5 + [False]]),
        default_user=torch.tensor([[0.0] * (DIM - 1) + [1.0]]),
        default_item=torch.zeros(1, DIM),
        offset=torch.tensor([0.25]),
        snapshot_times=torch.tensor([0]),
        model_name="mf",
        field_values=[("studio", "pixar")],
        field_vectors=torch.tensor([[0.5] * DIM]),
    )


def build_checkpoint(folder: Path, tokenizer_folder: Path, backbone: Path, text_only: bool) -> Path:
    table = None if text_only else film_table()
    processor = CCFLLMProcessor(
        PreTrainedTokenizerFast.from_pretrained(tokenizer_folder),
        list(TITLES),
        list(TITLES.values()),
        [] if text_only else USERS,
        history_format="title" if text_only else "slot",
        candidate_format="title" if text_only else "title_slot",
        history_window=(3, 2),
        field_values=[] if table is None else table.field_values,
    )
    torch.manual_seed(0)
    model = CCFLLMForCTR.from_backbone(
        str(backbone),
        processor,
        cf=table,
    )
    model.save_pretrained(folder, form="full")
    processor.save_pretrained(folder)
    return folder
