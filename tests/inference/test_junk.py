"""Whatever the processor and the ranker are given, they answer with a sentence of their own."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.ranker import CTRRanker

CALLS = 250
ATOMS: list[Any] = [
    *(None, 0, 1, 7, -1, 3.5, float("nan"), float("inf"), True, "", "1", "Heat (1995)", "x" * 500),
    *(b"1", b"\xff\xfe", 10**30, 1e300, complex(1, 2), object(), int, slice(1), pd.NA, pd.NaT),
    *("\ud800", {"title": "T", "studio": "\ud800"}),
    *({}, {"id": "1"}, {"title": "New"}, {"title": None}, {"title": [1]}, {"title": 7}),
    *(
        {"id": [1]},
        {"id": "1", "liked": False},
        {"id": "1", "liked": "no"},
        {"id": "2", "liked": 1},
    ),
    *(
        {"id": "1", "rating": "x"},
        {"title": "T", "studio": {"a": 1}},
        {"title": "T", "studio": [3]},
    ),
    *([], ["1"], ["1", "2"], [["1"]], [["1"], ["2"]], [[[]]], ("1",), {"1"}, range(3)),
    *(np.array([1, 2]), np.array([[1, 2]]), np.array("1"), np.float32(2.5), np.int64(3)),
    *(torch.tensor([1, 2]), torch.tensor(1), pd.Series(["1", "2"]), pd.DataFrame({"a": [1]})),
]
SOUND: dict[str, list[Any]] = {
    "user": ["a", None, "new"],
    "history": [["1", "2"], [], None],
    "candidates": [["3", "4"], ["5"], ["2", "A new film"]],
    "history_lengths": [None, [0, 1], [1]],
    "labels": [None, [0, 1], [1]],
    "earlier": [None, []],
    "top_k": [1, 3],
    "preselect": [5, 100],
    "max_per_topic": [None],
    "item": ["3", "A new film"],
    "max_lines": [None, 2],
    "users": [["a", "b"], None],
    "histories": [[["1"], []], None],
    "pairs": [[("a", "1")], [{"item": "2"}]],
}
TAKEN = {
    "pack": ("user", "history", "candidates", "history_lengths", "labels", "earlier"),
    "rank": ("user", "history", "candidates", "top_k", "preselect", "max_per_topic"),
    "rank_many": ("users", "histories", "candidates", "top_k"),
    "explain": ("user", "history", "item", "max_lines"),
    "predict": ("pairs",),
}


def junk(draw: random.Random) -> Any:
    """One odd value, a list of them, or a list of lists."""
    kind = draw.random()
    if kind < 0.5:
        return draw.choice(ATOMS)
    odd = [draw.choice(ATOMS) for _ in range(draw.randrange(4))]
    if kind < 0.8:
        return odd
    return [[draw.choice(ATOMS), *odd[:1]] for _ in odd]


@pytest.mark.parametrize("name", TAKEN)
def test_junk_is_answered_or_refused_in_a_sentence(checkpoint, name: str) -> None:
    ranker = CTRRanker.from_pretrained(str(checkpoint))
    call: Callable[..., Any] = ranker.processor if name == "pack" else getattr(ranker, name)
    refusal = ValueError if name == "pack" else InputError
    draw = random.Random(name)
    answered = refused = 0
    for _ in range(CALLS):
        given = {
            argument: junk(draw) if draw.random() < 0.4 else draw.choice(SOUND[argument])
            for argument in TAKEN[name]
        }
        if name == "predict":
            given = {"pairs": [(junk(draw), junk(draw)), {"item": "1", "history": junk(draw)}]}
        try:
            call(**given)
            answered += 1
        except refusal as error:
            refused += 1
            assert str(error), given
    assert answered + refused == CALLS and refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": [7, 0]}, "labels holds 7: give 0 or 1"),
        ({"labels": [float("nan"), 0]}, "labels holds nan: give 0 or 1"),
        ({"labels": 1}, "labels is 1: give one number a candidate, in a list"),
        ({"history_lengths": [-1, 0]}, "give whole numbers from 0 to the history's 1 items"),
        ({"history_lengths": ["1", 0]}, "give whole numbers from 0 to the history's 1 items"),
        ({"history": {"id": "1"}}, "give a list of items"),
        ({"history": [{"id": "1", "liked": "no"}]}, "liked is True or False"),
        ({"history": [{"title": ["Heat"]}]}, "give an id, a title, or a dict with either"),
    ],
)
def test_the_processor_names_what_is_wrong(checkpoint, given, message) -> None:
    processor = CTRRanker.from_pretrained(str(checkpoint)).processor
    with pytest.raises(ValueError, match=message):
        processor(**{"history": ["1"], "candidates": ["2", "3"]} | given)
