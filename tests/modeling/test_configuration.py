"""A raw id is the same text by whatever door it comes in; no backbone is made up."""

import decimal
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ccf_llm_hf import CCFLLMForCTR
from ccf_llm_hf.modeling.configuration_ccf_llm import read_id


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12, "12"),
        (12.0, "12"),
        ("12.0", "12"),
        (" 12 ", "12"),
        (b"12", "12"),
        (np.int64(12), "12"),
        (np.float32(12), "12"),
        (np.str_("12"), "12"),
        (np.bytes_(b"12"), "12"),
        (np.array(12), "12"),
        (torch.tensor(12), "12"),
        (decimal.Decimal("12.0"), "12"),
        (2**70, str(2**70)),
        (2**53 + 1, "9007199254740993"),
        (1.9, "1.9"),
        ("007", "007"),
        ("1.90", "1.90"),
        ("nan", "nan"),
        (uuid.UUID(int=1), str(uuid.UUID(int=1))),
        *((missing, None) for missing in (None, "", " ", b"", float("nan"), np.nan, pd.NA, pd.NaT)),
    ],
)
def test_one_id_has_one_spelling(value: Any, text: str | None) -> None:
    assert read_id(value) == text


@pytest.mark.parametrize(
    "value",
    [
        ["1"],
        ("1",),
        {"1"},
        {"id": "1"},
        np.array([1]),
        torch.tensor([1]),
        pd.Series([1, 2]),
        zip([1], strict=True),
        (id for id in "1"),
        next(pd.DataFrame({"user": [1]}).itertuples()),
        b"\xff",
        1e18,
    ],
)
def test_what_is_no_single_id_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is no id") as caught:
        read_id(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backbone", "named"),
    [
        ({"model_type": "llama"}, "vocab_size of its llama"),
        ({"model_type": "gpt2", "vocab_size": 9}, "n_embd of its gpt2"),
        ({"model_type": "qwen2", "vocab_size": 9, "hidden_size": -8}, "hidden_size of its qwen2"),
        ({"model_type": "qwen2", "vocab_size": 9, "hidden_size": "8"}, "hidden_size of its qwen2"),
    ],
)
def test_a_backbone_without_sizes_is_not_built_of_default_ones(
    tmp_path: Path, backbone: dict[str, Any], named: str
) -> None:
    settings = {"model_type": "ccf_llm", "text_config": backbone}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"config\.json gives no {named} backbone") as caught:
        CCFLLMForCTR.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
