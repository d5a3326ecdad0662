"""A tiny random checkpoint that reads all that one can: fields, dislikes, ratings, evidence.

    python benchmarks/service_checkpoint.py FOLDER

Its catalog has the titles of docs/serving.md.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.cf.vectors import CFVectors

BOOKS = {
    "Carrie": "Stephen King",
    "Misery": "Stephen King",
    "The Green Mile": "Stephen King",
    "Emma": "Jane Austen",
    "Persuasion": "Jane Austen",
    "Dune": "Frank Herbert",
    "Ubik": "Philip K. Dick",
    "Solaris": "Stanislaw Lem",
    "Middlemarch": "George Eliot",
    "Silas Marner": "George Eliot",
}
USERS = ["42", "43", "44"]
DIM = 6


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer learned from the books."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [*BOOKS, *BOOKS.values(), "Answer Yes or No. Liked: Yes No Yes No"]
    tokenizer.train_from_iterator(words * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )


def build_table() -> CFVectors:
    """Random vectors; the last dimension is item bias, and the last book is unknown."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(1, len(BOOKS), DIM, generator=generator)
    users = torch.randn(1, len(USERS), DIM, generator=generator)
    users[..., -1] = 1.0
    return CFVectors(
        user_ids=USERS,
        item_ids=[f"b{row}" for row in range(len(BOOKS))],
        item_titles=list(BOOKS),
        user_vectors=users,
        item_vectors=items,
        user_known=torch.ones(1, len(USERS), dtype=torch.bool),
        item_known=torch.tensor([[True] * (len(BOOKS) - 1) + [False]]),
        default_user=torch.tensor([[0.0] * (DIM - 1) + [1.0]]),
        default_item=torch.zeros(1, DIM),
        offset=torch.tensor([0.25]),
        snapshot_times=torch.tensor([0]),
        model_name="mf",
        field_values=[("author", "stephen king"), ("author", "jane austen")],
        field_vectors=torch.randn(1, 2, DIM, generator=generator)[0],
    )


def build_service_checkpoint(folder: Path, *, positions: int = 4096, plain: bool = False) -> Path:
    """Save a full checkpoint; a `plain` one reads likes alone, and no fields."""
    tokenizer, table = build_tokenizer(), build_table()
    if plain:
        table = replace(table, field_values=[], field_vectors=None)
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=positions,
        )
    )
    backbone.save_pretrained(folder / "backbone")
    fields = {
        "histories": "signed",
        "rating_scale": (3.0, 1.0),
        "item_template": "{title} by {author}",
        "evidence_fields": ["author"],
        "item_fields": [{"author": author, "year": 1974} for author in BOOKS.values()],
    }
    processor = CCFLLMProcessor(
        tokenizer,
        table.item_ids,
        table.item_titles,
        table.user_ids,
        history_format="slot",
        candidate_format="title_slot",
        history_window=(4, 2),
        field_values=table.field_values,
        **({} if plain else fields),
    )
    model = CCFLLMForCTR.from_backbone(str(folder / "backbone"), processor, cf=table)
    with torch.no_grad():
        model.answer_weight.normal_(std=0.5)
    model.save_pretrained(folder / "checkpoint", form="full")
    processor.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


if __name__ == "__main__":
    print(build_service_checkpoint(Path(sys.argv[1])))
