"""The recorded example: what it holds, and how a difference from it is told."""

import json
from pathlib import Path

import pytest
import torch
from tiny import BuildModel

from ccf_llm_hf import CCFLLMConfig
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.example import (
    card_call,
    catalog_call,
    largest_difference,
    last_error,
    read_calls,
    record_example,
)
from ccf_llm_hf.hub.model_card import write_model_card

CARD = """
```python
print("no processor here"
```
```python
batch = processor(
    history=["Heat (1995)"], candidates=["Alien (1979)", "Se7en (1995)"], return_tensors="pt"
)
```
"""


def test_the_call_of_a_card_is_read_from_its_code(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert card_call(card) is None
    card.write_text("no code")
    assert card_call(card) is None
    card.write_text(CARD)
    assert card_call(card) == {
        "history": ["Heat (1995)"],
        "candidates": ["Alien (1979)", "Se7en (1995)"],
    }


@pytest.mark.parametrize("fusion", ["gate", "text_only"])
def test_the_calls_of_card_and_catalog_are_recorded_once(
    build: BuildModel, tmp_path: Path, fusion: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = build(fusion)
    model.train()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert read_calls(tmp_path) == []
    write_model_card(tmp_path, config=CCFLLMConfig.from_pretrained(tmp_path))
    record_example(tmp_path, model, processor)
    assert "A title outside the catalog" not in caplog.text, "the user did not type it"
    shown, catalog = read_calls(tmp_path)
    assert model.training, "left as it was"
    assert shown["inputs"] == card_call(tmp_path / "README.md")
    assert catalog["inputs"] == catalog_call(processor)
    assert catalog["inputs"]["candidates"][-1] == {"title": "A title outside the catalog"}
    for call in (shown, catalog):
        with torch.no_grad():
            again = model.eval()(**processor(**call["inputs"])).logits
        torch.testing.assert_close(torch.tensor(call["logits"]), again)
    with torch.no_grad():
        model.answer_weight.mul_(2)
    record_example(tmp_path, model, processor)
    assert read_calls(tmp_path) == [shown, catalog], "a record is not overwritten"


def test_a_difference_names_the_call_and_the_mend() -> None:
    recorded = [{"inputs": {"candidates": ["a", "b"]}, "logits": [[0.5, 1.0]]}]
    assert largest_difference([[[0.5, 1.0]]], recorded) == 0.0
    assert largest_difference([[[0.5, 1.000005]]], recorded) == pytest.approx(5e-6, rel=0.1)
    for scores in ([[0.5, 1.001]], [[0.5]], [[0.5, float("nan")]]):
        with pytest.raises(InputError, match=r'\["a", "b"\].*limit 1e-05.*delete example.json'):
            largest_difference([scores], recorded)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    for text in ("{", "{}", '{"calls": [{"inputs": 1}]}', json.dumps({"calls": [1]})):
        (tmp_path / "example.json").write_text(text)
        with pytest.raises(InputError, match=r"example\.json holds no recorded calls"):
            read_calls(tmp_path)


def test_the_last_error_is_one_line() -> None:
    trace = "Loading: 3%\nTraceback (most recent call last):\n  File x\nOSError: no\n  such file\n"
    assert last_error(trace) == "OSError: no such file"
    assert last_error("a.b.SomeError: x\nmore") == "a.b.SomeError: x more"
    assert last_error("Killed\n") == "Killed"
    assert last_error("") == ""
