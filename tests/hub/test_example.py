"""The recorded example: what it holds, and how a difference from it is told."""

import json
from pathlib import Path

import pytest
import torch
from tiny import BuildModel

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.example import (
    find_last_error,
    make_catalog_call,
    measure_difference,
    read_calls,
    record_example,
)
from ccf_llm_hf.hub.model_card import CardFacts, read_facts, write_card


@pytest.mark.parametrize("fusion", ["gate", "text_only"])
def test_the_calls_of_card_and_catalog_are_recorded_once(
    build: BuildModel, tmp_path: Path, fusion: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = build(fusion)
    model.train()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert read_calls(tmp_path) == []
    record_example(tmp_path, model, processor)
    assert "A title outside the catalog" not in caplog.text, "the user did not type it"
    shown, catalog = read_calls(tmp_path)
    assert model.training, "left as it was"
    assert shown["inputs"] == read_facts(tmp_path).example
    assert catalog["inputs"] == make_catalog_call(processor)
    assert catalog["inputs"]["candidates"][-1] == {"title": "A title outside the catalog"}
    for call in (shown, catalog):
        with torch.no_grad():
            again = model.eval()(**processor(**call["inputs"])).logits
        torch.testing.assert_close(torch.tensor(call["logits"]), again)
    with torch.no_grad():
        model.answer_weight.mul_(2)
    record_example(tmp_path, model, processor)
    assert read_calls(tmp_path) == [shown, catalog], "a record is not overwritten"
    other = {"history": ["Alien (1979)"], "candidates": ["Heat (1995)"]}
    write_card(tmp_path, CardFacts("films", other))
    record_example(tmp_path, model, processor)
    assert [call["inputs"] for call in read_calls(tmp_path)][2:] == [other], "what the card shows"


def test_a_difference_names_the_call_and_the_mend() -> None:
    recorded = [{"inputs": {"candidates": ["a", "b"]}, "logits": [[0.5, 1.0]]}]
    assert measure_difference([[[0.5, 1.0]]], recorded) == 0.0
    assert measure_difference([[[0.5, 1.000005]]], recorded) == pytest.approx(5e-6, rel=0.1)
    for scores in ([[0.5, 1.001]], [[0.5]], [[0.5, float("nan")]]):
        with pytest.raises(InputError, match=r'\["a", "b"\].*limit 1e-05.*delete example.json'):
            measure_difference([scores], recorded)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    for text in ("{", "{}", '{"calls": [{"inputs": 1}]}', json.dumps({"calls": [1]})):
        (tmp_path / "example.json").write_text(text)
        with pytest.raises(InputError, match=r"example\.json holds no recorded calls"):
            read_calls(tmp_path)


def test_the_find_last_error_is_one_line() -> None:
    trace = "Loading: 3%\nTraceback (most recent call last):\n  File x\nOSError: no\n  such file\n"
    assert find_last_error(trace) == "OSError: no such file"
    assert find_last_error("a.b.SomeError: x\nmore") == "a.b.SomeError: x more"
    assert find_last_error("Killed\n") == "Killed"
    assert find_last_error("") == ""
