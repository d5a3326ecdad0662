"""A tiny world to train in: a Llama of two layers, 24 films, 16 users, 3 CF snapshots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.prepare import PrepareConfig, prepare
from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.training.recipe import Recipe, Stage
from ccf_llm_hf.training.stage import RunInputs, StageRun

StageRunMaker = Callable[..., StageRun]

NUM_USERS, NUM_ITEMS, ROWS_PER_USER, DIM = 16, 24, 20, 4


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with a byte tokenizer in which " Yes" and " No" are one token."""
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Answer Yes or No. Yes No"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder whose labels follow from hidden vectors of users and items."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    users, items = draw.normal(size=(NUM_USERS, DIM)), draw.normal(size=(NUM_ITEMS, DIM))
    rows = []
    for user in range(NUM_USERS):
        for item in draw.permutation(NUM_ITEMS)[:ROWS_PER_USER]:
            label = int(users[user] @ items[item] + 0.5 * items[item, 0] > 0)
            time = 1_600_000_000 + int(draw.integers(0, 1_000_000))
            rows.append((f"u{user}", f"i{item}", f"Film number {item}", label, time))
    columns = ["user_id", "item_id", "title", "label", "timestamp"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "rows.csv", index=False)
    config = PrepareConfig(
        source="table",
        interactions=str(folder / "rows.csv"),
        label_column="label",
        ratios=[0.6, 0.2, 0.2],
        out=str(folder / "prepared"),
    )
    return prepare(config, summary=False)


@pytest.fixture(scope="session")
def cf_dir(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A CF table of three snapshots: the hidden vectors, ever less noisy; one item unknown."""
    folder = tmp_path_factory.mktemp("cf")
    data = load_prepared(data_dir)
    times = np.asarray(data.splits["train"]["timestamp"])
    draw = np.random.default_rng(0)
    users, items = draw.normal(size=(NUM_USERS, DIM)), draw.normal(size=(NUM_ITEMS, DIM))
    order = [int(item.removeprefix("i")) for item in data.items["item_id"]]
    noise = np.array([3.0, 1.0, 0.3])[:, None, None]
    user_vectors = users + noise * draw.normal(size=(3, NUM_USERS, DIM))
    item_vectors = items[order] + noise * draw.normal(size=(3, NUM_ITEMS, DIM))
    known = torch.ones(3, NUM_ITEMS, dtype=torch.bool)
    known[:, -1] = False
    CFVectors(
        user_ids=[f"u{user}" for user in range(NUM_USERS)],
        item_ids=list(data.items["item_id"]),
        item_titles=list(data.items["title"]),
        user_vectors=torch.tensor(user_vectors, dtype=torch.float32),
        item_vectors=torch.tensor(item_vectors, dtype=torch.float32),
        user_known=torch.ones(3, NUM_USERS, dtype=torch.bool),
        item_known=known,
        default_user=torch.zeros(3, DIM),
        default_item=torch.zeros(3, DIM),
        offset=torch.zeros(3),
        snapshot_times=torch.tensor([0, int(np.median(times)), int(times.max()) + 1]),
        model_name="mf",
    ).save(folder)
    return folder


@pytest.fixture(scope="session")
def settings(backbone: Path, data_dir: Path, cf_dir: Path) -> dict[str, Any]:
    """Top-level recipe entries but for `output_dir` and `stages`."""
    return {
        "data_dir": str(data_dir),
        "cf_dir": str(cf_dir),
        "backbone": str(backbone),
    }


@pytest.fixture(scope="session")
def inputs(settings: dict[str, Any]) -> RunInputs:
    """The tiny world, loaded."""
    return RunInputs.load(Recipe(**settings, output_dir="unused", stages=[Stage(name="any")]))


@pytest.fixture
def stage_run(settings: dict[str, Any], inputs: RunInputs, tmp_path: Path) -> StageRunMaker:
    """Makes a `StageRun` in a folder of its own; keyword arguments are sections of the stage."""

    def make(
        folder: str = "run",
        start: Path | None = None,
        top: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        **sections: Any,
    ) -> StageRun:
        training = {"labels_per_step": 32, "tokens_per_batch": 512, **(training or {})}
        stage = Stage(**{"name": "stage", "training": training, **sections})
        recipe = Recipe(**settings | (top or {}), output_dir=str(tmp_path / folder), stages=[stage])
        return StageRun(recipe, stage, inputs, tmp_path / folder, start)

    return make
