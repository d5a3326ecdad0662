"""A small catalog of films behind a tiny random CCF-LLM, saved as a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from films import TITLES, USERS, build_checkpoint, film_table

from ccf_llm_hf.data.prepare import PrepareConfig, prepare


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
