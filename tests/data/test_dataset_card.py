import re
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from raw_data import START, small_raw

from ccf_llm_hf.data import PrepareConfig, interactions, load_prepared, prepare

Make = Callable[..., PrepareConfig]


@pytest.mark.parametrize("kind", ["csv", "dat"])
def test_load_dataset_round_trip(kind: str, prepared_config: Make, tmp_path: Path) -> None:
    out = prepare(prepared_config(None, kind), summary=False)
    data, cache = load_prepared(out), str(tmp_path / "cache")
    splits = load_dataset(str(out), cache_dir=cache)
    assert set(splits) == {"train", "validation", "test"}
    for name, split in splits.items():
        assert split.to_list() == data.splits[name].to_list()
        assert split.features == data.splits[name].features
    items = load_dataset(str(out), "items", cache_dir=cache)["train"]
    assert items.to_list() == data.items.to_list()
    log = load_dataset(str(out), "interactions", cache_dir=cache)["train"]
    assert log["timestamp"][:] == interactions(out)["timestamp"].tolist()


def test_the_code_of_the_card_prints_what_stands_below_it(
    prepared_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(prepared_config(), summary=False)
    card = (out / "README.md").read_text()
    (code,), (printed,) = (
        re.findall(rf"```{name}\n(.*?)```", card, re.DOTALL) for name in ("python", "text")
    )
    exec(code.replace("path/to/this/folder", str(out)), {})
    assert capsys.readouterr().out == printed


def test_card_states_protocol_and_rejected_rows(prepared_config: Make) -> None:
    raw = small_raw()
    raw.rows.append(("1", "nowhere", "5", str(START)))
    out = prepare(prepared_config(raw, name="Shop: 50 %"), summary=False)
    card = DatasetCard.load(out / "README.md")
    protocol = load_prepared(out).protocol
    assert card.data.pretty_name == "Shop: 50 % for CTR prediction"
    assert card.data.license is None
    for text in ("label_rule", "split_rule", "history_rule"):
        assert protocol[text] in card.text
    assert f"| train | {protocol['splits']['train']['rows']} | 6 |" in card.text
    assert (
        "`unknown_item`: 1. Item is not in the items table: dropped. Places: ratings.csv:56."
        in card.text
    )
    assert "Do not upload" not in card.text
    assert "`year`, `genres`; 12 items" in card.text
    assert "`timestamp` (Unix seconds)" in card.text


def test_movielens_card_forbids_redistribution(prepared_config: Make) -> None:
    out = prepare(prepared_config(None, "dat"), summary=False)
    card = DatasetCard.load(out / "README.md")
    assert card.data.license == "other"
    assert "Do not upload this folder" in card.text
    assert "no redistribution" in card.text
    assert "10.1145/2827872" in card.text
