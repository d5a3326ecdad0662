"""A small catalog of films behind a tiny random CCF-LLM, saved as a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.prepare import PrepareConfig, prepare

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


@pytest.fixture
def film_folder(tmp_path: Path) -> Path:
    """The CF table of the films, saved."""
    film_table().save(tmp_path / "cf")
    return tmp_path / "cf"


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_folder: Path,
    backbone_folder: Callable[[str], Path],
) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    return build_checkpoint(folder, tokenizer_folder, backbone_folder("llama"), text_only=False)


@pytest.fixture(scope="session")
def text_only_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_folder: Path,
    backbone_folder: Callable[[str], Path],
) -> Path:
    folder = tmp_path_factory.mktemp("text")
    return build_checkpoint(folder, tokenizer_folder, backbone_folder("llama"), text_only=True)


@pytest.fixture(scope="session")
def split() -> datasets.Dataset:
    rows = [
        ("a", "2", 1, []),
        ("a", "3", 0, ["2"]),
        ("a", "4", 1, ["2"]),
        ("a", "5", 1, ["2", "4"]),
        ("a", "6", 0, ["2", "4", "5", "1", "3"]),
        ("new", "1", 1, []),
        ("new", "3", 0, ["1"]),
    ]
    names = ("user_id", "item_id", "label", "history")
    return datasets.Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder over the same films: 60 rows of four users, `new` unknown to the model."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = [
        f"{(*USERS, 'new')[n % 4]},{film},{TITLES[film]},{(7 * n) % 5 + 1},{1_600_000_000 + n}"
        for n in range(60)
        for film in [str(n * 5 % 6 + 1)]
    ]
    table = folder / "ratings.csv"
    table.write_text("\n".join(["user_id,item_id,title,rating,timestamp", *rows]) + "\n")
    config = PrepareConfig(
        source="table",
        out=str(folder / "data"),
        interactions=str(table),
        rating_column="rating",
        ratios=[0.5, 0.25, 0.25],
    )
    return prepare(config, summary=False)
